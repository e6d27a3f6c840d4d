// A codebook in shared memory: what all threads of a block fetch before the first of them encodes.
#pragma once

#include "cuda/device.cuh"
#include "cuda/encode.h"

namespace bitfold::cuda {

__device__ inline int thread_of_block() {
  return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
}

// Each bin kLanes times.
template <int kLanes = 1>
__device__ inline void fetch_bins(const DeviceEncoding& encoding, Bin* bins) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int i = thread_of_block(); i < kBins * kLanes; i += threads)
    bins[i] = encoding.bins[i / kLanes];
  __syncthreads();
}

__device__ inline void fetch_levels(const DeviceEncoding& encoding, float* levels) {
  if (thread_of_block() < kMaxLevels)
    levels[thread_of_block()] = encoding.levels[thread_of_block()];
  __syncthreads();
}

}  // namespace bitfold::cuda
