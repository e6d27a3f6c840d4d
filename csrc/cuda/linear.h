// Products with a packed weight on a GPU: the host entry points. As in kernels.h, all pointers are
// the current device's memory, and work is queued on `stream`.
#pragma once

#include "cuda/linear_plan.h"
#include "cuda/stream.h"
#include "cuda/weight.h"

namespace bitfold::cuda {

GpuLimits current_gpu();

// y [m, rows] = x [m, cols] wᵀ + bias [rows] (or null), all of `dtype` and contiguous; plan.m rows
// of 16-bit x. `partial` holds plan.partials(rows) floats. codes and x begin at multiples of 16
// bytes.
Status linear_mma(const DeviceWeight& w, const MmaPlan& plan, const void* x, const void* bias,
                  FloatType dtype, float* partial, void* y, cudaStream_t stream);

// The same for any weight, dtype and address, in fp32.
Status linear_any(const DeviceWeight& w, const void* x, int64_t m, const void* bias,
                  FloatType dtype, void* y, cudaStream_t stream);

}  // namespace bitfold::cuda
