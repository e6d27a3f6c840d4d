#include "torch/cuda/context.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace bitfold::binding {

CudaContext::CudaContext(const Place& place, const char* op)
    : guard_(place.gpu), device_(torch::headeronly::DeviceType::CUDA, place.gpu) {
  const int32_t device = place.gpu;
  // The guard spoke to torch's copy of the CUDA runtime; this library has its own.
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) {
    fail(op, "CUDA device " + std::to_string(device) + ": " + cudaGetErrorString(error));
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

Tensor scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Char);
}

DevicePacked unpack_cuda(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
                         const char* op) {
  if (packed.empty()) fail(op, "packed must hold the tensors of a weight, got none");
  const Place place = gpu_of(packed);
  DevicePacked result{unpack_buffers(packed, spec, op, place), {}, place};
  result.weight =
      cuda::make_device_weight(result.format, result.rows, result.cols, result.data.data());
  return result;
}

}  // namespace bitfold::binding
