// Bytes to and from a GPU's memory, and waiting for them. Few things need it: a solver that must
// know numbers to go on.
#pragma once

#include <cstdint>

#include "core/status.h"
#include "cuda/stream.h"

namespace bitfold::cuda {

// `from` may change as soon as this returns.
Status copy_to_device(void* to, const void* from, int64_t bytes, cudaStream_t stream);
// Waits for `stream`.
Status copy_to_host(void* to, const void* from, int64_t bytes, cudaStream_t stream);
Status wait_for(cudaStream_t stream);
Status copy_on_device(void* to, const void* from, int64_t bytes, cudaStream_t stream);
// Zeros.
Status clear(void* to, int64_t bytes, cudaStream_t stream);

}  // namespace bitfold::cuda
