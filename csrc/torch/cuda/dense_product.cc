#include "torch/cuda/dense_product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <array>

namespace bitfold::binding {
namespace {

Tensor wrap(const Tensor& like, FloatType dtype, const void* data, std::array<int64_t, 2> sizes,
            std::array<int64_t, 2> strides) {
  return torch::stable::from_blob(
      const_cast<void*>(data), {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
      torch::stable::Device(torch::headeronly::DeviceType::CUDA, like.get_device_index()),
      scalar_type(dtype));
}

}  // namespace

void multiply_dense(const Tensor& like, FloatType dtype, const DenseMatrix& a, const DenseMatrix& b,
                    bool transpose_b, const void* bias, const DenseMatrix& out) {
  const Tensor left = wrap(like, dtype, a.data, {a.rows, a.cols}, {a.stride, 1});
  const Tensor right = transpose_b ? wrap(like, dtype, b.data, {b.cols, b.rows}, {1, b.stride})
                                   : wrap(like, dtype, b.data, {b.rows, b.cols}, {b.stride, 1});
  const Tensor result = wrap(like, dtype, out.data, {out.rows, out.cols}, {out.stride, 1});
  if (bias) {
    const Tensor row = wrap(like, dtype, bias, {1, out.cols}, {out.cols, 1});
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(result.get(), row.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(result.get(), left.get(), right.get()));
  }
}

}  // namespace bitfold::binding
