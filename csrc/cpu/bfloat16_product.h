// Products on a unit that multiplies tiles of bfloat16 numbers (AMX), where there is one and enough
// rows of x make up for decoding the weight. Panels of 32 rows become bfloat16 in cache, 256
// columns at a time.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// y = x w^T + bias, as linear (cpu/linear.h), for m rows of x. `one_plane`: both sides to the
// nearest bfloat16 number, else to twice its digits. False, and y is as before, if x holds what is
// left to fp32 arithmetic. k.bfloat16 is not null.
bool multiply_bfloat16(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                       const void* bias, FloatType dtype, bool one_plane, void* y,
                       const Parallel& parallel);

}  // namespace bitfold
