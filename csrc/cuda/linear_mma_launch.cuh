// From a plan to the instance of linear_mma that carries it out. Instances of different bits are
// compiled in files of their own, side by side.
#pragma once

#include <atomic>

#include "cuda/linear_mma.cuh"

namespace bitfold::cuda {

template <int kBits>
Status launch_mma(const MmaTask& task, FloatType dtype, cudaStream_t stream);

// More than 48 KB of shared memory must be asked for, once per kernel and GPU.
template <auto kKernel>
bool allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done.load(std::memory_order_relaxed) & bit) return true;
  if (cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
      cudaSuccess)
    return false;
  done.fetch_or(bit, std::memory_order_relaxed);
  return true;
}

template <int kBits, FloatType kType, Decoding kDecoding, int kTiles>
Status launch_tiles(const MmaTask& task, int shared_limit, cudaStream_t stream) {
  constexpr auto kKernel = linear_mma<kBits, kType, kTiles, kDecoding>;
  if (!allow_shared_memory<kKernel>(shared_limit)) return launched("linear_mma");
  const Launch launch{task.plan.grid, 1, static_cast<uint32_t>(task.plan.warps) * 32, 1};
  return run("linear_mma", kKernel, launch, static_cast<size_t>(task.plan.shared_bytes), stream,
             task);
}

int shared_limit_of_current_gpu();

template <int kBits, FloatType kType, Decoding kDecoding>
Status launch_decoding(const MmaTask& task, cudaStream_t stream) {
  const int limit = shared_limit_of_current_gpu();
  switch (task.plan.column_tiles) {
    case 1:
      return launch_tiles<kBits, kType, kDecoding, 1>(task, limit, stream);
    case 2:
      return launch_tiles<kBits, kType, kDecoding, 2>(task, limit, stream);
    case 4:
      return launch_tiles<kBits, kType, kDecoding, 4>(task, limit, stream);
    default:
      return launch_tiles<kBits, kType, kDecoding, 8>(task, limit, stream);
  }
}

template <int kBits, FloatType kType>
Status launch_type(const MmaTask& task, cudaStream_t stream) {
  if constexpr (kBits == 4) {
    if (decoding_of(task.w.view) == Decoding::kArithmetic)
      return launch_decoding<kBits, kType, Decoding::kArithmetic>(task, stream);
  }
  return launch_decoding<kBits, kType, kOnlyDecoding<kBits>>(task, stream);
}

template <int kBits>
Status launch_mma(const MmaTask& task, FloatType dtype, cudaStream_t stream) {
  return dtype == FloatType::kFloat16 ? launch_type<kBits, FloatType::kFloat16>(task, stream)
                                      : launch_type<kBits, FloatType::kBFloat16>(task, stream);
}

}  // namespace bitfold::cuda
