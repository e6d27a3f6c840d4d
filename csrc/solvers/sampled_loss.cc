#include "solvers/sampled_loss.h"

#include <algorithm>

namespace bitfold {
namespace {

constexpr int64_t kPanelsAtOnce = 16;

// R_kk^2 by column.
std::vector<double> costs_of(const Factorization& f, int64_t n) {
  std::vector<double> costs(static_cast<size_t>(n));
  for (int64_t a = 0; f.found && a < n; ++a) {
    const double own = f.lower[static_cast<size_t>(a * n + a)];
    costs[static_cast<size_t>(f.column[static_cast<size_t>(a)])] = own * own;
  }
  return costs;
}

// The errors of panel p, [cols, 16] at `width`.
void read_errors(PanelMatrix* w, Feedback* feedback, int64_t p, float* errors, int64_t width) {
  if (feedback) {
    for (int64_t c = 0; c < w->cols; ++c) {
      std::copy_n(
          feedback->error() + feedback->position_of(c) * feedback->stride() + p * kPanelLanes,
          kPanelLanes, errors + c * width);
    }
    return;
  }
  std::vector<float> error(static_cast<size_t>(w->cols * kPanelLanes));
  std::vector<uint8_t> codes(error.size());
  w->round(p, error.data(), codes.data());
  for (int64_t c = 0; c < w->cols; ++c)
    std::copy_n(error.data() + c * kPanelLanes, kPanelLanes, errors + c * width);
}

// H errors, both [cols, width].
std::vector<double> times_hessian(const HessianView& h, const std::vector<float>& errors,
                                  int64_t width, const LinearAlgebra& algebra) {
  const int64_t n = h.n;
  std::vector<double> out(errors.size());
  if (h.fp64) {
    const std::vector<double> wide(errors.begin(), errors.end());
    algebra.gemm64(false, false, n, width, n, 1.0, static_cast<const double*>(h.data), n,
                   wide.data(), width, 0.0, out.data(), width);
  } else {
    std::vector<float> narrow(errors.size());
    algebra.gemm(false, false, n, width, n, 1.0f, static_cast<const float*>(h.data), n,
                 errors.data(), width, 0.0f, narrow.data(), width);
    std::copy(narrow.begin(), narrow.end(), out.begin());
  }
  return out;
}

}  // namespace

SampledLoss sample_loss(PanelMatrix* w, const Factorization& f, const HessianView& h,
                        int64_t most_rows, Feedback* feedback, const LinearAlgebra& algebra,
                        const Parallel& parallel) {
  const std::vector<int64_t> panels = measured_panels(w->panels, most_rows);
  const std::vector<double> costs = costs_of(f, w->cols);
  SampledLoss sum;
  for (size_t first = 0; first < panels.size(); first += kPanelsAtOnce) {
    const size_t count = std::min<size_t>(kPanelsAtOnce, panels.size() - first);
    const int64_t width = static_cast<int64_t>(count) * kPanelLanes;
    std::vector<float> errors(static_cast<size_t>(w->cols * width));
    parallel(static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        read_errors(w, feedback, panels[first + static_cast<size_t>(i)],
                    errors.data() + i * kPanelLanes, width);
    });
    const std::vector<double> products = times_hessian(h, errors, width, algebra);
    for (size_t i = 0; i < count; ++i) {
      const int64_t p = panels[first + i];
      for (int64_t lane = 0; lane < w->rows_of(p); ++lane, ++sum.rows) {
        if (feedback) sum.tracked += feedback->loss()[static_cast<size_t>(p * kPanelLanes + lane)];
        for (int64_t c = 0; c < w->cols; ++c) {
          if (f.dead[static_cast<size_t>(c)]) continue;
          const auto at =
              static_cast<size_t>(c * width + static_cast<int64_t>(i) * kPanelLanes + lane);
          const double e = errors[at];
          sum.loss += e * products[at];
          sum.added += e * e * f.added;
          sum.predicted += e * e * costs[static_cast<size_t>(c)];
        }
      }
    }
  }
  return sum;
}

}  // namespace bitfold
