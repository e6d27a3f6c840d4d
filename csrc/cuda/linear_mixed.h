// LLM.int8() on a GPU: as cpu/mixed_product.h.
#pragma once

#include "core/view.h"
#include "cuda/stream.h"
#include "cuda/weight.h"

namespace bitfold::cuda {

// Which columns of x are outliers.
struct MixedColumns {
  float threshold;         // those with any |x| above it, in any row, or NaN; used where
  bool fixed;              // false;
  const int64_t* columns;  // else these, ascending, in the host's memory
  int64_t count;
};

int64_t linear_mixed_scratch_bytes(int64_t m, int64_t cols);
// y [m, rows] = x [m, cols] w^T + bias [rows] or null; int8 codes around 128 with one scale for a
// row. Sums of integers are exact.
Status linear_mixed(const DeviceWeight& w, const void* x, int64_t m, const void* bias,
                    FloatType dtype, const MixedColumns& columns, void* scratch, void* y,
                    cudaStream_t stream);

}  // namespace bitfold::cuda
