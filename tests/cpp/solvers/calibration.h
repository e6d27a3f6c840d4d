// What the tests of calibrated solvers share: linear algebra by plain loops, and inputs of a layer.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "solvers/gptq.h"
#include "support.h"

namespace bitfold::testing {

template <class T>
void naive_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha,
                const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.0;
      for (int64_t p = 0; p < k; ++p) {
        sum += static_cast<double>(transpose_a ? a[p * lda + i] : a[i * lda + p]) *
               (transpose_b ? b[j * ldb + p] : b[p * ldb + j]);
      }
      T& to = c[i * ldc + j];
      to = static_cast<T>(alpha * sum + (beta == T{0} ? 0.0 : static_cast<double>(beta) * to));
    }
  }
}

template <class T>
bool naive_cholesky(int64_t n, T* a) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      T sum = a[i * n + j];
      for (int64_t p = 0; p < j; ++p) sum -= a[i * n + p] * a[j * n + p];
      if (i == j && !(sum > T{0})) return false;
      a[i * n + j] = i == j ? std::sqrt(sum) : sum / a[j * n + j];
    }
    for (int64_t i = 0; i < j; ++i) a[i * n + j] = T{0};
  }
  return true;
}

inline void naive_cholesky_solve(int64_t n, const float* l, int64_t m, float* b, int64_t ldb) {
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = b[i * ldb + j];
      for (int64_t p = 0; p < i; ++p) sum -= static_cast<double>(l[i * n + p]) * b[p * ldb + j];
      b[i * ldb + j] = static_cast<float>(sum / l[i * n + i]);
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      double sum = b[i * ldb + j];
      for (int64_t p = i + 1; p < n; ++p) sum -= static_cast<double>(l[p * n + i]) * b[p * ldb + j];
      b[i * ldb + j] = static_cast<float>(sum / l[i * n + i]);
    }
  }
}

inline const LinearAlgebra& naive_algebra() {
  static const LinearAlgebra algebra{naive_gemm<float>, naive_gemm<double>, naive_cholesky<float>,
                                     naive_cholesky<double>, naive_cholesky_solve};
  return algebra;
}

// mean(x x^T) of correlated inputs of very different sizes; the inputs named in `dead` are zero.
inline std::vector<float> random_hessian(int64_t n, unsigned seed,
                                         const std::vector<int64_t>& dead = {}) {
  const int64_t tokens = 3 * n + 8;
  const std::vector<float> noise = random_weights(tokens * n, seed);
  const std::vector<float> size = random_weights(n, seed + 1);
  std::vector<float> x(noise.size()), hessian(static_cast<size_t>(n * n));
  for (int64_t t = 0; t < tokens; ++t) {
    float carried = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      carried = 0.8f * carried + noise[static_cast<size_t>(t * n + i)];
      x[static_cast<size_t>(t * n + i)] = carried * std::exp(size[static_cast<size_t>(i)]);
    }
    for (int64_t i : dead) x[static_cast<size_t>(t * n + i)] = 0.0f;
  }
  naive_gemm<float>(true, false, n, n, tokens, 1.0f / static_cast<float>(tokens), x.data(), n,
                    x.data(), n, 0.0f, hessian.data(), n);
  return hessian;
}

// tr(E H E^T), E = w - q, H with `added` on its diagonal.
inline double loss_of(const std::vector<float>& w, const std::vector<float>& q,
                      const std::vector<float>& hessian, int64_t rows, double added = 0.0) {
  const auto n = static_cast<int64_t>(w.size()) / rows;
  double loss = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const auto e = [&](int64_t i) {
      const auto at = static_cast<size_t>(r * n + i);
      return static_cast<double>(w[at]) - q[at];
    };
    for (int64_t i = 0; i < n; ++i) {
      double product = added * e(i);
      for (int64_t j = 0; j < n; ++j) product += hessian[static_cast<size_t>(i * n + j)] * e(j);
      loss += e(i) * product;
    }
  }
  return loss;
}

struct Solved {
  std::vector<float> decoded;
  std::vector<std::vector<uint8_t>> bytes;
  GptqReport report;
  Status status;
};

inline Solved solve(const std::string& format, const std::vector<float>& w,
                    const std::vector<float>& hessian, int64_t rows, GptqOptions options,
                    const KernelTable& k, const Parallel& parallel = run_serially) {
  const auto n = static_cast<int64_t>(w.size()) / rows;
  options.measured_rows = -1;
  const Format parsed = format_of(format);
  Owned packed(parsed, rows, n);
  std::vector<void*> buffers;
  for (size_t i = 0; i < parsed.buffers(rows, n).size(); ++i) buffers.push_back(packed.pointer(i));
  Solved solved;
  solved.status = gptq_quantize(
      {k, naive_algebra(), parallel}, parsed, {w.data(), FloatType::kFloat32, rows, n, n, 1},
      {hessian.data(), false, n}, options, buffers.data(), &solved.report);
  if (!solved.status.ok()) return solved;
  solved.decoded = packed.decoded();
  solved.bytes = packed.bytes();
  return solved;
}

}  // namespace bitfold::testing
