// Every host entry point of the GPU side. All pointers are the current device's memory unless said
// otherwise; work is queued on `stream` and nothing waits for it. A failed launch is a Status.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/view.h"
#include "cuda/weight.h"

namespace bitfold::cuda {

// out [rows, cols] in `dtype`, contiguous.
Status dequantize(const DeviceWeight& w, FloatType dtype, void* out, cudaStream_t stream);

// out[i, :] = w[indices[i], :], i < count; int64 indices if `wide`, else int32. An index outside of
// the rows is printed and ends the device's context, as torch's own embedding does: looking before
// would be waiting.
Status embedding(const DeviceWeight& w, const void* indices, bool wide, int64_t count,
                 FloatType dtype, void* out, cudaStream_t stream);

}  // namespace bitfold::cuda
