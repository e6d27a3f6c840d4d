// Borrowed linear algebra: the caller (torch's BLAS and LAPACK, or plain loops in GoogleTest) hands
// these in, so that solvers know no library, and none writes a product of matrices or a Cholesky
// factorization of its own.
#pragma once

#include <cstdint>
#include <functional>

namespace bitfold {

// All matrices are row-major; leading dimensions count elements.
struct LinearAlgebra {
  // c[m, n] = beta * c + alpha * op(a) * op(b), op(a) [m, k], op(b) [k, n]; op transposes where
  // asked. With beta 0 c need not be initialized.
  template <class T>
  using Gemm = std::function<void(bool transpose_a, bool transpose_b, int64_t m, int64_t n,
                                  int64_t k, T alpha, const T* a, int64_t lda, const T* b,
                                  int64_t ldb, T beta, T* c, int64_t ldc)>;
  // a[n, n], of which the lower triangle is read, becomes the lower triangular l of a = l l^T, zero
  // above. False where a is not positive definite; a is then unspecified.
  template <class T>
  using Cholesky = std::function<bool(int64_t n, T* a)>;

  Gemm<float> gemm;
  Gemm<double> gemm64;
  Cholesky<float> cholesky;
  Cholesky<double> cholesky64;
  // b[n, m] <- (l l^T)^-1 b.
  std::function<void(int64_t n, const float* l, int64_t m, float* b, int64_t ldb)> cholesky_solve;
};

}  // namespace bitfold
