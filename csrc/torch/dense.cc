#include "torch/dense.h"

#include <array>

namespace bitfold::binding {

Tensor borrow(const void* data, ScalarType dtype, const Device& device, int64_t rows, int64_t cols,
              int64_t row_stride, int64_t col_stride) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.data(), sizes.size()},
                                  {strides.data(), strides.size()}, device, dtype);
}

// Torch factors inside its result, so that handing in the same memory twice costs no copy.
void factor_in_place(const Tensor& a, const Tensor& status) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(true),
      torch::stable::detail::from(false), torch::stable::detail::from(a),
      torch::stable::detail::from(status)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linalg_cholesky_ex", "L", stack.data(), TORCH_ABI_VERSION));
  // The results are `a` and `status`, handed over once more.
  const auto factor = torch::stable::detail::to<Tensor>(stack[0]);
  const auto code = torch::stable::detail::to<Tensor>(stack[1]);
}

void solve_with_factor(const float* l, const Device& device, int64_t n, int64_t m, float* b,
                       int64_t ldb) {
  Tensor right = borrow(b, device, n, m, ldb, 1);
  const Tensor factor = borrow(l, device, n, n, n, 1);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(right),
                                    torch::stable::detail::from(factor),
                                    torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cholesky_solve", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::copy_(right, torch::stable::detail::to<Tensor>(stack[0]));
}

}  // namespace bitfold::binding
