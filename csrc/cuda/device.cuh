// What .cu files share: tables in the GPU's memory, and the check after a launch.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/status.h"
#include "cuda/launch.h"

namespace bitfold::cuda {

// Constant, but not in constant memory: lanes of a warp look up different entries.
static __device__ const float kDeviceDynamicMap[256] = {
#include "core/dynamic_map.inc"
};

inline dim3 grid_of(const Launch& launch) { return dim3(launch.grid_x, launch.grid_y); }
inline dim3 block_of(const Launch& launch) { return dim3(launch.block_x, launch.block_y); }

// What the launch just made has to say; `kernel` is named in the sentence.
inline Status launched(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return Status::success();
  std::string text =
      std::string("CUDA refused the kernel ") + kernel + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    text += "; bitfold was not built for this GPU: rebuild with BITFOLD_CUDA_ARCHITECTURES=native";
  }
  return Status::error(StatusCode::kInvalidArgument, text);
}

}  // namespace bitfold::cuda
