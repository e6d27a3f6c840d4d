// Where an op on CUDA tensors runs: their device, the stream that torch has chosen there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/weight.h"
#include "torch/checks.h"

namespace bitfold::binding {

// Makes the tensor's device the current one while it lives; `stream` is torch's current stream
// there.
class CudaContext {
 public:
  CudaContext(const Tensor& tensor, const char* op);
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Fails unless `tensor` lies on the GPU of `other`, naming both.
void check_same_gpu(const Tensor& tensor, const Tensor& other, const char* op, const char* argument,
                    const char* whose);

struct DevicePacked : PackedBuffers {
  cuda::DeviceWeight weight;
};

// As unpack, on the GPU of packed[0]; reads none of the bytes.
DevicePacked unpack_cuda(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
                         const char* op);

}  // namespace bitfold::binding
