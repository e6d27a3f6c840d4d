#include "cuda/kernels.h"
#include "torch/cuda/context.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

Tensor dequantize(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
                  ScalarType dtype) {
  constexpr const char* kOp = "dequantize";
  const DevicePacked w = unpack_cuda(packed, spec, kOp);
  const FloatType type = float_type(dtype, kOp, "dtype");
  const CudaContext context(w.place, kOp);
  Tensor out = torch::stable::new_empty(packed[0], {w.rows, w.cols}, dtype);
  check(cuda::dequantize(w.weight, type, out.mutable_data_ptr(), context.stream()), kOp);
  return out;
}

Tensor embedding(const Tensor& indices, const std::vector<Tensor>& packed,
                 const std::vector<int64_t>& spec, ScalarType dtype) {
  constexpr const char* kOp = "embedding";
  const DevicePacked w = unpack_cuda(packed, spec, kOp);
  const FloatType type = float_type(dtype, kOp, "dtype");
  const bool wide = indices.scalar_type() == ScalarType::Long;
  if (!wide && indices.scalar_type() != ScalarType::Int) {
    fail(kOp, std::string("indices must be int64 or int32, got ") + name_of(indices.scalar_type()));
  }
  check_beside(indices, w.place, kOp, "indices", "the packed weight");
  const CudaContext context(w.place, kOp);
  const Tensor index = as_contiguous(indices);
  std::vector<int64_t> sizes(index.sizes().begin(), index.sizes().end());
  sizes.push_back(w.cols);
  Tensor out = torch::stable::new_empty(packed[0], sizes, dtype);
  check(cuda::embedding(w.weight, index.const_data_ptr(), wide, index.numel(), type,
                        out.mutable_data_ptr(), context.stream()),
        kOp);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CUDA, m) {
  implement<"dequantize", &dequantize>(m);
  implement<"embedding", &embedding>(m);
}

}  // namespace bitfold::binding
