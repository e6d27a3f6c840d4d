// The Hessian of a layer made ready for rounding with error feedback: order of columns, damping,
// one Cholesky factorization.
//
// With H = R R^T, R upper triangular, tr(E H E^T) is the sum over columns k of
// R_kk^2 (e_k + sum_{j<k} e_j R_jk / R_kk)^2: rounding column k from w_k + sum_{j<k} e_j R_jk /
// R_kk makes each term as small as the grid allows. These are GPTQ's codes (Frantar et al.,
// 2210.17323) without its inverse and second factorization; see also LDLQ (2307.13304). R is the
// lower factor of H with rows and columns in reverse. So everything here is kept by `position`,
// which counts columns backwards: the k-th to be rounded is at n - 1 - k.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/parallel.h"
#include "core/status.h"
#include "solvers/linear_algebra.h"

namespace bitfold {

// E[x x^T], both halves filled, contiguous.
struct HessianView {
  const void* data;  // float, or double if fp64
  bool fp64;
  int64_t n;

  double at(int64_t i, int64_t j) const {
    return fp64 ? static_cast<const double*>(data)[i * n + j]
                : static_cast<double>(static_cast<const float*>(data)[i * n + j]);
  }
  std::vector<double> diagonal() const;
  // Fails on NaN and infinity, naming the place.
  Status check_finite(const Parallel& parallel, const char* name = "hessian") const;
};

// What is said of a NaN or an infinity in a matrix of statistics.
Status non_finite_entry(const char* name, int64_t i, int64_t j, bool is_nan);

enum class ColumnOrder {
  kGiven,       // first to last
  kDescending,  // by falling diagonal: inputs that matter most are rounded while most can make good
  kGroups,      // the same inside groups, and among groups by their sums
};

// Columns in the order of rounding.
std::vector<int32_t> order_columns(ColumnOrder order, const std::vector<double>& diagonal,
                                   int64_t group_size);

struct Factorization {
  std::vector<int32_t> column;  // [n] by position
  std::vector<uint8_t> dead;    // [n] by column: inputs that are always zero
  int64_t dead_count = 0;
  double damping = 0.0;  // lambda that was used
  double added = 0.0;    // to the diagonal: lambda * its mean
  bool fp64 = false;     // whether float32 was not enough
  bool found = false;    // whether any damping made H positive definite

  std::unique_ptr<float[]> hessian;  // [n, n] damped, by position; where asked for
  std::unique_ptr<float[]> lower;    // [n, n] its factor: lower lower^T
};

inline constexpr double kMostDamping = 0.5;

// What is said where a solver cannot do without a factor.
Status not_positive_definite();

// What follows from the diagonal of H: order and dead inputs.
Factorization begin_factorization(const std::vector<double>& diagonal, std::vector<int32_t> order);

// Tries lambda in float32, then in float64, then raised step by step up to kMostDamping: until
// attempt(fp64), which arranges H with f->added on its diagonal and factors it, says that it was
// positive definite.
void climb_damping(const std::vector<double>& diagonal, double lambda,
                   const std::function<bool(bool fp64)>& attempt, Factorization* f);

// H + lambda * mean(diagonal) I, a dead input's diagonal replaced by 1. Tried in float32, then in
// float64, then with lambda raised step by step up to kMostDamping.
Factorization factorize(const HessianView& h, std::vector<int32_t> order, double lambda,
                        bool keep_hessian, const LinearAlgebra& algebra, const Parallel& parallel);

}  // namespace bitfold
