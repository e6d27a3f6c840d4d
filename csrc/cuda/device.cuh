// What .cu files share: tables in the GPU's memory, and launching. A C++ compiler takes them too,
// with an emulation of threads in the place of CUDA (tests/cpp/cuda/emulator.h).
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda/emulator.h"
#endif

#include <string>

#include "core/status.h"
#include "core/view.h"
#include "cuda/launch.h"

namespace bitfold::cuda {

// Constant, but not in constant memory: lanes of a warp look up different entries.
static __device__ const float kDeviceDynamicMap[256] = {
#include "core/dynamic_map.inc"
};

// Blocks that a multiprocessor has room for at least, as __launch_bounds__ takes it: four are 64
// registers a thread, and three 80 for kernels that would spill a few of them.
inline constexpr int kFourBlocks = 4, kThreeBlocks = 3;
template <FloatType kType>
inline constexpr int kBlocksFor = kType == FloatType::kFloat32 ? kThreeBlocks : kFourBlocks;

// A launch that is not worth planning.
inline Launch blocks(uint32_t count) { return {count, 1, kThreads, 1}; }

#if defined(__CUDACC__)

// The shared memory whose size the launch says.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bitfold_shared_memory[];
  return reinterpret_cast<T*>(bitfold_shared_memory);
}

// What the launch just made has to say; `name` is the kernel's.
inline Status launched(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return Status::success();
  std::string text =
      std::string("CUDA refused the kernel ") + name + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    text += "; bitfold was not built for this GPU: rebuild with BITFOLD_CUDA_ARCHITECTURES=native";
  }
  return Status::error(StatusCode::kInvalidArgument, text);
}

// Launches a kernel, with `shared` bytes of dynamic shared memory, and looks whether that worked.
template <class... Parameters, class... Arguments>
Status run(const char* name, void (*kernel)(Parameters...), const Launch& launch, size_t shared,
           cudaStream_t stream, const Arguments&... arguments) {
  if (launch.empty()) return Status::success();
  kernel<<<dim3(launch.grid_x, launch.grid_y), dim3(launch.block_x, launch.block_y), shared,
           stream>>>(arguments...);
  return launched(name);
}

#else

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::shared_memory());
}

template <class... Parameters, class... Arguments>
Status run(const char* name, void (*kernel)(Parameters...), const Launch& launch, size_t shared,
           cudaStream_t /*stream*/, const Arguments&... arguments) {
  if (launch.empty()) return Status::success();
  const char* refusal =
      emulator::run(reinterpret_cast<const void*>(kernel), launch.grid_x, launch.grid_y,
                    launch.block_x, launch.block_y, shared, [&] { kernel(arguments...); });
  if (!refusal) return Status::success();
  return Status::error(StatusCode::kInvalidArgument,
                       std::string("the emulator refused the kernel ") + name + ": " + refusal);
}

#endif

}  // namespace bitfold::cuda
