#include <cstring>
#include <mutex>

#include "cuda/level_factor.h"
#include "cuda/linear.h"
#include "cuda/linear_mma_launch.cuh"

namespace bitfold::cuda {

extern template Status launch_mma<2>(const MmaTask&, FloatType, cudaStream_t);
extern template Status launch_mma<3>(const MmaTask&, FloatType, cudaStream_t);
extern template Status launch_mma<4>(const MmaTask&, FloatType, cudaStream_t);
extern template Status launch_mma<8>(const MmaTask&, FloatType, cudaStream_t);

namespace {

// The slices' results in one order, so that they are the same bits every time.
template <FloatType kType>
__global__ void __launch_bounds__(kThreads)
    add_slices(const float* __restrict__ partial, int slices, int64_t n, int64_t rows,
               const void* __restrict__ bias, void* __restrict__ y) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int s = 0; s < slices; ++s) sum += partial[s * n + i];
    if (bias) sum += as_float<kType>(bias, i % rows);
    static_cast<uint16_t*>(y)[i] = static_cast<uint16_t>(to_pair<kType>(sum, 0.0f));
  }
}

}  // namespace

GpuLimits current_gpu() {
  constexpr int kMost = 64;
  static std::mutex mutex;
  static GpuLimits known[kMost];
  static bool asked[kMost];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMost) device = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!asked[device]) {
    cudaDeviceGetAttribute(&known[device].multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&known[device].shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                           device);
    asked[device] = true;
  }
  return known[device];
}

int shared_limit_of_current_gpu() { return current_gpu().shared_bytes; }

Status linear_mma(const DeviceWeight& w, const MmaPlan& plan, const void* x, const void* bias,
                  FloatType dtype, float* partial, void* y, cudaStream_t stream) {
  const bool slices = plan.slices > 1;
  const MmaTask task{w, plan, level_factor(w, dtype), x, bias, y, slices ? partial : nullptr};
  Status status = w.view.bits == 8   ? launch_mma<8>(task, dtype, stream)
                  : w.view.bits == 4 ? launch_mma<4>(task, dtype, stream)
                  : w.view.bits == 3 ? launch_mma<3>(task, dtype, stream)
                                     : launch_mma<2>(task, dtype, stream);
  if (!status.ok() || !slices) return status;
  const int64_t n = plan.m * w.view.rows;
  Launch launch;
  if (status = plan_items(n, &launch); !status.ok()) return status;
  const auto add = dtype == FloatType::kFloat16 ? add_slices<FloatType::kFloat16>
                                                : add_slices<FloatType::kBFloat16>;
  return run("add_slices", add, launch, 0, stream, static_cast<const float*>(partial), plan.slices,
             n, w.view.rows, bias, y);
}

}  // namespace bitfold::cuda
