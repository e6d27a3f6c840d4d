#include "torch/cuda/context.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace bitfold::binding {

CudaContext::CudaContext(const Tensor& tensor, const char* op) : guard_(tensor.get_device_index()) {
  const int32_t device = tensor.get_device_index();
  // The guard spoke to torch's copy of the CUDA runtime; this library has its own.
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) {
    fail(op, "CUDA device " + std::to_string(device) + ": " + cudaGetErrorString(error));
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

namespace {

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return tensor.is_cpu() ? "the CPU" : "another device";
}

}  // namespace

void check_same_gpu(const Tensor& tensor, const Tensor& other, const char* op, const char* argument,
                    const char* whose) {
  if (is_on_device_of(tensor, other)) return;
  fail(op, std::string(argument) + " must be on the same device as " + whose + " (" +
               device_of(other) + "), got " + device_of(tensor));
}

DevicePacked unpack_cuda(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
                         const char* op) {
  if (packed.empty()) fail(op, "packed must hold the tensors of a weight, got none");
  DevicePacked result{unpack_buffers(packed, spec, op, &packed[0]), {}};
  result.weight =
      cuda::make_device_weight(result.format, result.rows, result.cols, result.data.data());
  return result;
}

}  // namespace bitfold::binding
