#include "solvers/factor.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <string>

namespace bitfold {
namespace {

constexpr double kFirstStep = 0.0025;  // of lambda; doubled every time
constexpr int64_t kGrainEntries = 1 << 16;

// Rows and columns of H by position, the diagonal damped.
template <class T>
void arrange(const HessianView& h, const Factorization& f, const Parallel& parallel, T* out) {
  parallel(h.n, grain(h.n, kGrainEntries), [&](int64_t begin, int64_t end) {
    const auto fill = [&](const auto* data) {
      for (int64_t a = begin; a < end; ++a) {
        const int64_t i = f.column[static_cast<size_t>(a)];
        const auto* from = data + i * h.n;
        T* to = out + a * h.n;
        for (int64_t b = 0; b < h.n; ++b)
          to[b] = static_cast<T>(from[f.column[static_cast<size_t>(b)]]);
        const double own = f.dead[static_cast<size_t>(i)] ? 1.0 : static_cast<double>(from[i]);
        to[a] = static_cast<T>(own + f.added);
      }
    };
    h.fp64 ? fill(static_cast<const double*>(h.data)) : fill(static_cast<const float*>(h.data));
  });
}

}  // namespace

std::vector<double> HessianView::diagonal() const {
  std::vector<double> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = at(i, i);
  return values;
}

Status HessianView::check_finite(const Parallel& parallel, const char* name) const {
  std::atomic<int64_t> bad_row = n;
  parallel(n, grain(n, kGrainEntries), [&](int64_t begin, int64_t end) {
    const auto scan = [&](const auto* values) {
      for (int64_t i = begin; i < end; ++i) {
        auto poison = values[i * n] * 0;  // NaN and infinity times zero are NaN, and stay
        for (int64_t j = 0; j < n; ++j) poison += values[i * n + j] * 0;
        int64_t seen = bad_row;
        while (poison != 0 && i < seen && !bad_row.compare_exchange_weak(seen, i)) {
        }
      }
    };
    fp64 ? scan(static_cast<const double*>(data)) : scan(static_cast<const float*>(data));
  });
  if (bad_row == n) return Status::success();
  int64_t j = 0;
  while (std::isfinite(at(bad_row, j))) ++j;
  return non_finite_entry(name, bad_row, j, std::isnan(at(bad_row, j)));
}

Status non_finite_entry(const char* name, int64_t i, int64_t j, bool is_nan) {
  return Status::error(StatusCode::kNonFinite,
                       std::string(name) + "[" + std::to_string(i) + ", " + std::to_string(j) +
                           "] is " + (is_nan ? "NaN" : "infinite") +
                           "; look for non-finite or huge activations in the calibration data");
}

std::vector<int32_t> order_columns(ColumnOrder order, const std::vector<double>& diagonal,
                                   int64_t group_size) {
  std::vector<int32_t> columns(diagonal.size());
  std::iota(columns.begin(), columns.end(), 0);
  if (order == ColumnOrder::kGiven) return columns;
  const auto n = static_cast<int64_t>(columns.size());
  const int64_t groups = (n + group_size - 1) / group_size;
  std::vector<double> of_group(static_cast<size_t>(groups));
  for (int64_t i = 0; i < n; ++i)
    of_group[static_cast<size_t>(i / group_size)] += diagonal[static_cast<size_t>(i)];
  // A short last group is judged by its mean, too.
  for (int64_t g = 0; g < groups; ++g)
    of_group[static_cast<size_t>(g)] /=
        static_cast<double>(std::min(group_size, n - g * group_size));
  std::stable_sort(columns.begin(), columns.end(), [&](int32_t a, int32_t b) {
    const auto ga = static_cast<size_t>(a / group_size), gb = static_cast<size_t>(b / group_size);
    if (order == ColumnOrder::kGroups && ga != gb)
      return of_group[ga] != of_group[gb] ? of_group[ga] > of_group[gb] : ga < gb;
    return diagonal[static_cast<size_t>(a)] > diagonal[static_cast<size_t>(b)];
  });
  return columns;
}

Status not_positive_definite() {
  return Status::error(StatusCode::kInvalidArgument,
                       "hessian is not positive definite, even with " +
                           std::to_string(kMostDamping) + " of its mean diagonal added");
}

Factorization begin_factorization(const std::vector<double>& diagonal, std::vector<int32_t> order) {
  Factorization f;
  f.column.assign(order.rbegin(), order.rend());
  for (double own : diagonal) {
    f.dead.push_back(own == 0.0);
    f.dead_count += f.dead.back();
  }
  return f;
}

void climb_damping(const std::vector<double>& diagonal, double lambda,
                   const std::function<bool(bool fp64)>& attempt, Factorization* f) {
  const auto alive = static_cast<int64_t>(diagonal.size()) - f->dead_count;
  const double sum = std::accumulate(diagonal.begin(), diagonal.end(), 0.0);
  const double mean = alive > 0 ? sum / static_cast<double>(alive) : 1.0;
  f->damping = lambda;
  for (double step = kFirstStep;; step *= 2) {
    f->added = f->damping * mean;
    f->fp64 = false;
    f->found = attempt(false);
    if (f->found) return;
    f->fp64 = f->found = attempt(true);
    if (f->found || f->damping >= kMostDamping) return;
    f->damping = std::min(kMostDamping, f->damping + step);
  }
}

Factorization factorize(const HessianView& h, std::vector<int32_t> order, double lambda,
                        bool keep_hessian, const LinearAlgebra& algebra, const Parallel& parallel) {
  const auto n = static_cast<size_t>(h.n);
  const std::vector<double> diagonal = h.diagonal();
  Factorization f = begin_factorization(diagonal, std::move(order));
  f.lower.reset(new float[n * n]);
  if (keep_hessian) f.hessian.reset(new float[n * n]);
  const auto attempt = [&](bool fp64) {
    if (!fp64) {
      arrange(h, f, parallel, f.lower.get());
      if (keep_hessian) std::copy_n(f.lower.get(), n * n, f.hessian.get());
      return algebra.cholesky(h.n, f.lower.get());
    }
    std::unique_ptr<double[]> wide(new double[n * n]);
    arrange(h, f, parallel, wide.get());
    if (!algebra.cholesky64(h.n, wide.get())) return false;
    // In float32 the factor must stay one: no diagonal may vanish.
    for (size_t i = 0; i < n; ++i)
      if (!(static_cast<float>(wide[i * n + i]) > 0.0f)) return false;
    std::transform(wide.get(), wide.get() + n * n, f.lower.get(),
                   [](double v) { return static_cast<float>(v); });
    return true;
  };
  climb_damping(diagonal, lambda, attempt, &f);
  return f;
}

}  // namespace bitfold
