// Products in float32: weights are decoded a tile at a time into scratch that stays in cache; no
// function here ever holds a float copy of more than 32768 weights per thread. The `fp32` level of
// linear, its gradient, and what integers cannot stand for.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// y [m, w.rows] = x [m, w.cols] * w^T + bias [w.rows] or null.
void multiply_floats(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                     const void* bias, FloatType dtype, void* y, const Parallel& parallel);

// gx [m, w.cols] = g [m, w.rows] * w.
void multiply_floats_transposed(const KernelTable& k, const PackedView& w, const void* g, int64_t m,
                                FloatType dtype, void* gx, const Parallel& parallel);

}  // namespace bitfold
