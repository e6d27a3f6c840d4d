// Where an op on CUDA tensors runs: their device, the stream that torch has chosen there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/weight.h"
#include "torch/checks.h"

namespace bitfold::binding {

// Makes the GPU of `place` the current one while it lives; `stream` is torch's current stream
// there. Comes after the checks: the arguments may lie elsewhere.
class CudaContext {
 public:
  CudaContext(const Place& place, const char* op);
  cudaStream_t stream() const { return stream_; }
  torch::stable::Device device() const { return device_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::Device device_;
  cudaStream_t stream_ = nullptr;
};

// Memory for the length of a call, from torch's own pool of the current stream.
Tensor scratch(const Tensor& like, int64_t bytes);

struct DevicePacked : PackedBuffers {
  cuda::DeviceWeight weight;
  Place place;
};

// As unpack, on one GPU; reads none of the bytes.
DevicePacked unpack_cuda(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
                         const char* op);

}  // namespace bitfold::binding
