// A packed weight, or chosen rows of it, as floats.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// out [rows, cols] in `dtype`, contiguous.
void dequantize(const KernelTable& k, const PackedView& w, FloatType dtype, void* out,
                const Parallel& parallel);

// out[i, :] = w[indices[i], :]; indices must have been checked against w.rows.
void embedding(const KernelTable& k, const PackedView& w, const int64_t* indices, int64_t count,
               FloatType dtype, void* out, const Parallel& parallel);

}  // namespace bitfold
