#include "torch/linear_algebra.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "torch/dense.h"

namespace bitfold::binding {
namespace {

Device cpu() { return Device(torch::headeronly::DeviceType::CPU); }

template <class T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha, const T* a,
          int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  const Tensor left = transpose_a ? borrow(a, cpu(), m, k, 1, lda) : borrow(a, cpu(), m, k, lda, 1);
  const Tensor right =
      transpose_b ? borrow(b, cpu(), k, n, 1, ldb) : borrow(b, cpu(), k, n, ldb, 1);
  const Tensor out = borrow(c, cpu(), m, n, ldc, 1);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, alpha));
}

// Column-major, as LAPACK has it, the lower triangle of a row-major matrix is the upper one.
template <class T>
bool cholesky(int64_t n, T* a) {
  int32_t info = 0;
  const torch::headeronly::IntHeaderOnlyArrayRef none;  // a scalar has no sizes
  factor_in_place(borrow(a, cpu(), n, n, 1, n),
                  torch::stable::from_blob(&info, none, none, cpu(), ScalarType::Int));
  return info == 0;
}

void cholesky_solve(int64_t n, const float* l, int64_t m, float* b, int64_t ldb) {
  solve_with_factor(l, cpu(), n, m, b, ldb);
}

}  // namespace

const LinearAlgebra& torch_linear_algebra() {
  static const LinearAlgebra algebra{gemm<float>, gemm<double>, cholesky<float>, cholesky<double>,
                                     cholesky_solve};
  return algebra;
}

}  // namespace bitfold::binding
