// Products with a packed weight. Weights are decoded a tile at a time into scratch that
// stays in cache; no function here ever holds a float copy of more than 32768 weights per thread.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// y [m, w.rows] = x [m, w.cols] * w^T + bias [w.rows] or null; x, y and bias contiguous, of the
// same dtype; fp32 accumulation.
void linear(const KernelTable& k, const PackedView& w, const void* x, int64_t m, const void* bias,
            FloatType dtype, void* y, const Parallel& parallel);

// gx [m, w.cols] = g [m, w.rows] * w; contiguous, same dtype.
void linear_grad_input(const KernelTable& k, const PackedView& w, const void* g, int64_t m,
                       FloatType dtype, void* gx, const Parallel& parallel);

}  // namespace bitfold
