// Products in integers, for which the weight is never decoded to floats: activations become 16-bit
// (or, at the `int8` level, 8-bit) integers with a scale per span of 16 to 256 columns, codes
// become integers as they are read, and float32 sums what is exact within those columns.
// docs/kernels.md says what each level loses.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// Whether, of 16-bit integers, a span is several units: sums become floats less often, and what
// the weight loses by it is hidden by the rounding of y to bfloat16.
bool sums_across_groups(FloatType dtype, int64_t m);

// y [m, w.rows] = x [m, w.cols] * w^T + bias [w.rows] or null. False, with y in any state, where
// only floats can stand for what x holds (infinite, NaN, huge or tiny values) or for the levels of
// a learned codebook (far outliers).
bool multiply_integers(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                       const void* bias, FloatType dtype, bool eight_bits, void* y,
                       const Parallel& parallel);

}  // namespace bitfold
