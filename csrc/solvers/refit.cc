#include "solvers/refit.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace bitfold {
namespace {

// Sums over a group, of one row or of all: d the unit decode, o ones, e the errors.
struct Sums {
  double de = 0.0, oe = 0.0, dd = 0.0, d_o = 0.0, oo = 0.0;  // d H e, o H e, d H d, d H o, o H o

  void add(const Sums& other) {
    de += other.de, oe += other.oe, dd += other.dd, d_o += other.d_o, oo += other.oo;
  }
  // Of the loss, when the decoded weights grow by scale * d + shift.
  double change(double scale, double shift) const {
    return -2.0 * (scale * de + shift * oe) + scale * scale * dd + 2.0 * scale * shift * d_o +
           shift * shift * oo;
  }
};

struct Choice {
  float scale, zero;
  double change;  // of the loss
};

class Refit {
 public:
  Refit(PanelMatrix* w, Feedback* feedback, const Factorization& f, int exponent,
        const ScaleStorage& storage, const LinearAlgebra& algebra, const Parallel& parallel)
      : w_(*w),
        feedback_(*feedback),
        f_(f),
        exponent_(exponent),
        storage_(storage),
        algebra_(algebra),
        parallel_(parallel),
        stride_(feedback->stride()) {}

  int64_t sweep() {
    int64_t changed = 0;
    for (int64_t g = 0; g < w_.groups; ++g) {
      prepare(g);
      changed += w_.format.grouping == Grouping::kTensor ? update_tensor() : update_rows(g);
    }
    return changed;
  }

 private:
  // Of group g: H times the errors, H times the unit decode, H times ones.
  void prepare(int64_t g) {
    first_ = g * w_.group_size;
    n_ = std::min(w_.group_size, w_.cols - first_);
    rows_of_h_.resize(static_cast<size_t>(n_ * w_.cols));
    inside_.resize(static_cast<size_t>(n_ * n_));
    ones_.assign(static_cast<size_t>(n_), 0.0f);
    for (int64_t j = 0; j < n_; ++j) {
      const float* from = f_.hessian.get() + feedback_.position_of(first_ + j) * w_.cols;
      std::copy_n(from, w_.cols, rows_of_h_.data() + j * w_.cols);
      for (int64_t i = 0; i < n_; ++i) {
        const float h = is_dead(j) || is_dead(i) ? 0.0f : from[feedback_.position_of(first_ + i)];
        inside_[static_cast<size_t>(j * n_ + i)] = h;
        ones_[static_cast<size_t>(j)] += h;
      }
    }
    const auto size = static_cast<size_t>(n_ * stride_);
    he_.resize(size), d_.resize(size), hd_.resize(size);
    algebra_.gemm(false, false, n_, w_.width(), w_.cols, 1.0f, rows_of_h_.data(), w_.cols,
                  feedback_.error(), stride_, 0.0f, he_.data(), stride_);
    parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const uint8_t* exact = w_.exact_of(p);
        for (int64_t j = 0; j < n_; ++j) {
          float* to = d_.data() + j * stride_ + p * kPanelLanes;
          w_.decode(p, first_ + j, to);
          for (int64_t i = 0; exact && i < kPanelLanes; ++i)
            to[i] = exact[(first_ + j) * kPanelLanes + i] ? 0.0f : to[i];
        }
      }
    });
    algebra_.gemm(false, false, n_, w_.width(), n_, 1.0f, inside_.data(), n_, d_.data(), stride_,
                  0.0f, hd_.data(), stride_);
  }

  bool is_dead(int64_t j) const { return f_.dead[static_cast<size_t>(first_ + j)] != 0; }
  // A shift of all weights of a group would move the exact ones, too.
  bool moves_zero() const { return w_.format.zero == Zero::kFloat && !w_.exact; }

  Sums sums_of(int64_t row) const {
    Sums s;
    for (int64_t j = 0; j < n_; ++j) {
      if (is_dead(j)) continue;
      const auto at = static_cast<size_t>(j * stride_ + row);
      const double d = d_[at], one = ones_[static_cast<size_t>(j)];
      s.de += d * he_[at];
      s.oe += he_[at];
      s.dd += d * hd_[at];
      s.d_o += d * one;
      s.oo += one;
    }
    return s;
  }

  // What (scale, zero) become when they move by least squares and are stored.
  void consider(const Sums& s, float scale, float zero, double by, double shift,
                Choice* best) const {
    Choice next{static_cast<float>(scale + by), zero, 0.0};
    if (!(next.scale > 0.0f) || !std::isfinite(next.scale)) return;
    if (shift != 0.0) next.zero = static_cast<float>(zero - shift / next.scale);
    if (!(std::fabs(next.zero) <= 2048.0f)) return;
    storage_.round(exponent_, 1, &next.scale, &next.zero);
    next.change =
        s.change(static_cast<double>(next.scale) - scale,
                 static_cast<double>(next.scale) * (static_cast<double>(zero) - next.zero));
    if (next.change < best->change) *best = next;
  }

  Choice choose(const Sums& s, float scale, float zero) const {
    Choice best{scale, zero, 0.0};
    if (!(scale > 0.0f) || !(s.dd > 0.0)) return best;
    consider(s, scale, zero, s.de / s.dd, 0.0, &best);
    const double determinant = s.dd * s.oo - s.d_o * s.d_o;
    if (moves_zero() && determinant > 1e-6 * s.dd * s.oo) {
      const double by = (s.de * s.oo - s.oe * s.d_o) / determinant;
      const double shift = (s.oe * s.dd - s.de * s.d_o) / determinant;
      consider(s, scale, zero, by, shift, &best);
    }
    return best;
  }

  // New parameters for a row, and the errors that go with them.
  void apply(int64_t g, int64_t row, const Choice& choice) {
    const int64_t p = row / kPanelLanes, lane = row % kPanelLanes;
    float& scale = w_.scale_of(p)[g * kPanelLanes + lane];
    float& zero = w_.zero_of(p)[g * kPanelLanes + lane];
    const float shift = zero - choice.zero;
    for (int64_t j = 0; j < n_; ++j) {
      const int64_t c = first_ + j, at = c * kPanelLanes + lane;
      if (w_.exact && w_.exact_of(p)[at]) continue;
      const float unit = d_[static_cast<size_t>(j * stride_ + row)] + shift;
      feedback_.error()[feedback_.position_of(c) * stride_ + row] =
          w_.weights_of(p)[at] - unit * choice.scale;
    }
    scale = choice.scale;
    zero = choice.zero;
  }

  int64_t update_rows(int64_t g) {
    std::atomic<int64_t> changed = 0;
    parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kPanelLanes; row < end * kPanelLanes; ++row) {
        const int64_t at = g * kPanelLanes + row % kPanelLanes;
        const float scale = w_.scale_of(row / kPanelLanes)[at];
        const float zero = w_.zero_of(row / kPanelLanes)[at];
        const Choice choice = choose(sums_of(row), scale, zero);
        if (!(choice.change < 0.0)) continue;
        apply(g, row, choice);
        feedback_.loss()[static_cast<size_t>(row)] += choice.change;
        changed += row < w_.rows;
      }
    });
    return changed;
  }

  int64_t update_tensor() {
    Sums all;
    std::vector<Sums> of_rows(static_cast<size_t>(w_.rows));
    for (int64_t r = 0; r < w_.rows; ++r) all.add(of_rows[static_cast<size_t>(r)] = sums_of(r));
    const float scale = w_.scale[0], zero = w_.zero[0];
    const Choice choice = choose(all, scale, zero);
    if (!(choice.change < 0.0)) return 0;
    const double by = static_cast<double>(choice.scale) - scale;
    const double shift =
        static_cast<double>(choice.scale) * (static_cast<double>(zero) - choice.zero);
    for (int64_t r = 0; r < w_.width(); ++r) {
      apply(0, r, choice);
      if (r < w_.rows)
        feedback_.loss()[static_cast<size_t>(r)] +=
            of_rows[static_cast<size_t>(r)].change(by, shift);
    }
    return 1;
  }

  PanelMatrix& w_;
  Feedback& feedback_;
  const Factorization& f_;
  const int exponent_;
  const ScaleStorage& storage_;
  const LinearAlgebra& algebra_;
  const Parallel& parallel_;
  const int64_t stride_;
  int64_t first_ = 0, n_ = 0;                     // columns of the present group
  std::vector<float> rows_of_h_, inside_, ones_;  // [n, cols] by position, [n, n], [n]
  std::vector<float> he_, d_, hd_;                // [n, rows at stride_]
};

}  // namespace

int64_t refit_scales(PanelMatrix* w, Feedback* feedback, const Factorization& f, int sweeps,
                     int exponent, ScaleStorage* storage, const LinearAlgebra& algebra,
                     const Parallel& parallel) {
  if (w->format.family() == Family::kLearnedCodebook) return 0;
  const std::vector<float> scale = w->scale, zero = w->zero;
  const double before = feedback->total_loss();
  int64_t changed = 0;
  Refit refit(w, feedback, f, exponent, *storage, algebra, parallel);
  for (int i = 0; i < sweeps; ++i) changed += refit.sweep();
  if (changed == 0) return 0;
  const auto stored = storage->save();
  w->store_scales(exponent, storage);
  if (!w->format.double_quant) return changed;
  feedback->measure();
  if (feedback->total_loss() < before) return changed;
  storage->restore(stored);
  w->scale = scale;
  w->zero = zero;
  feedback->measure();
  return 0;
}

}  // namespace bitfold
