#include "torch/linear_algebra.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "torch/checks.h"

namespace bitfold::binding {
namespace {

// Borrowed memory as a tensor [rows, cols]; torch hands transposed ones to BLAS as they are.
template <class T>
Tensor wrap(const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
  return torch::stable::from_blob(
      const_cast<T*>(data), {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
      torch::stable::Device(torch::headeronly::DeviceType::CPU),
      std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double);
}

template <class T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha, const T* a,
          int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  const Tensor left = transpose_a ? wrap(a, m, k, 1, lda) : wrap(a, m, k, lda, 1);
  const Tensor right = transpose_b ? wrap(b, k, n, 1, ldb) : wrap(b, k, n, ldb, 1);
  const Tensor out = wrap(c, m, n, ldc, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, alpha));
}

// Column-major, as LAPACK has it, the lower triangle of a row-major matrix is the upper one. Torch
// factors inside its result, so that handing in the same memory twice costs no copy.
template <class T>
bool cholesky(int64_t n, T* a) {
  const Tensor matrix = wrap(a, n, n, 1, n);
  int32_t info = 0;
  const torch::headeronly::IntHeaderOnlyArrayRef none;  // a scalar has no sizes
  const Tensor status = torch::stable::from_blob(
      &info, none, none, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Int);
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(matrix), torch::stable::detail::from(true),
      torch::stable::detail::from(false), torch::stable::detail::from(matrix),
      torch::stable::detail::from(status)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linalg_cholesky_ex", "L", stack.data(), TORCH_ABI_VERSION));
  // The results are `matrix` and `status`, handed over once more.
  const auto factor = torch::stable::detail::to<Tensor>(stack[0]);
  const auto code = torch::stable::detail::to<Tensor>(stack[1]);
  return info == 0;
}

void cholesky_solve(int64_t n, const float* l, int64_t m, float* b, int64_t ldb) {
  Tensor right = wrap(b, n, m, ldb, 1);
  const Tensor factor = wrap(l, n, n, n, 1);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(right),
                                    torch::stable::detail::from(factor),
                                    torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cholesky_solve", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::copy_(right, torch::stable::detail::to<Tensor>(stack[0]));
}

}  // namespace

const LinearAlgebra& torch_linear_algebra() {
  static const LinearAlgebra algebra{gemm<float>, gemm<double>, cholesky<float>, cholesky<double>,
                                     cholesky_solve};
  return algebra;
}

}  // namespace bitfold::binding
