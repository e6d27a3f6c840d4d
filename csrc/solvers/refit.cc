#include "solvers/refit.h"

#include <algorithm>
#include <atomic>

#include "core/scale_refit.h"

namespace bitfold {
namespace {

// Groups are taken a section of columns at a time: H times the errors is one product for all of
// them, and what changes on the way is added as it comes.
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
    const int64_t at_once = std::max<int64_t>(1, kSectionColumns / w_.group_size);
    for (int64_t first = 0; first < w_.groups; first += at_once) {
      const int64_t last = std::min(w_.groups, first + at_once);
      begin_section(first * w_.group_size, std::min(w_.cols, last * w_.group_size));
      for (int64_t g = first; g < last; ++g) {
        begin_group(g);
        changed += w_.format.grouping == Grouping::kTensor ? update_tensor() : update_rows(g);
      }
    }
    return changed;
  }

 private:
  // The columns [low, high): their rows of H, the part among themselves, H times the errors.
  void begin_section(int64_t low, int64_t high) {
    low_ = low;
    size_ = high - low;
    rows_of_h_.resize(static_cast<size_t>(size_ * w_.cols));
    inside_.resize(static_cast<size_t>(size_ * size_));
    parallel_(size_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const float* from = f_.hessian.get() + feedback_.position_of(low_ + j) * w_.cols;
        std::copy_n(from, w_.cols, rows_of_h_.data() + j * w_.cols);
        for (int64_t i = 0; i < size_; ++i) {
          const bool counts = !is_dead(low_ + j) && !is_dead(low_ + i);
          inside_[static_cast<size_t>(j * size_ + i)] =
              counts ? from[feedback_.position_of(low_ + i)] : 0.0f;
        }
      }
    });
    const auto area = static_cast<size_t>(size_ * stride_);
    he_.resize(area), d_.resize(area), hd_.resize(area), change_.resize(area);
    algebra_.gemm(false, false, size_, w_.width(), w_.cols, 1.0f, rows_of_h_.data(), w_.cols,
                  feedback_.error(), stride_, 0.0f, he_.data(), stride_);
  }

  // Of group g: H times the errors as they are by now, the unit decode, H times it and times ones.
  void begin_group(int64_t g) {
    first_ = g * w_.group_size - low_;
    n_ = std::min(w_.group_size, w_.cols - low_ - first_);
    if (first_ > 0) {
      algebra_.gemm(false, false, n_, w_.width(), first_, 1.0f, inside_.data() + first_ * size_,
                    size_, change_.data(), stride_, 1.0f, at(he_, 0), stride_);
    }
    ones_.assign(static_cast<size_t>(n_), 0.0f);
    for (int64_t j = 0; j < n_; ++j) {
      for (int64_t i = 0; i < n_; ++i)
        ones_[static_cast<size_t>(j)] +=
            inside_[static_cast<size_t>((first_ + j) * size_ + first_ + i)];
    }
    parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const uint8_t* exact = w_.exact_of(p);
        for (int64_t j = 0; j < n_; ++j) {
          float* to = at(d_, j) + p * kPanelLanes;
          w_.decode(p, column(j), to);
          for (int64_t i = 0; exact && i < kPanelLanes; ++i)
            to[i] = exact[column(j) * kPanelLanes + i] ? 0.0f : to[i];
        }
      }
    });
    algebra_.gemm(false, false, n_, w_.width(), n_, 1.0f, inside_.data() + first_ * size_ + first_,
                  size_, at(d_, 0), stride_, 0.0f, at(hd_, 0), stride_);
  }

  bool is_dead(int64_t c) const { return f_.dead[static_cast<size_t>(c)] != 0; }
  int64_t column(int64_t j) const { return low_ + first_ + j; }  // j-th of the group
  // Row j of the group in an array of the section.
  float* at(std::vector<float>& of_section, int64_t j) const {
    return of_section.data() + (first_ + j) * stride_;
  }
  // A shift of all weights of a group would move the exact ones, too.
  bool moves_zero() const { return w_.format.zero == Zero::kFloat && !w_.exact; }

  void sums_of(int64_t p, RefitSums* lanes) {
    std::fill_n(lanes, kPanelLanes, RefitSums{});
    for (int64_t j = 0; j < n_; ++j) {
      if (is_dead(column(j))) continue;
      const int64_t row = p * kPanelLanes;
      const float *d = at(d_, j) + row, *he = at(he_, j) + row, *hd = at(hd_, j) + row;
      const double one = ones_[static_cast<size_t>(j)];
      for (int64_t i = 0; i < kPanelLanes; ++i) {
        lanes[i].de += static_cast<double>(d[i]) * he[i];
        lanes[i].oe += he[i];
        lanes[i].dd += static_cast<double>(d[i]) * hd[i];
        lanes[i].d_o += d[i] * one;
        lanes[i].oo += one;
      }
    }
  }

  RefitChoice choose(const RefitSums& s, float scale, float zero) const {
    return choose_refit(s, scale, zero, moves_zero(), [&](float* new_scale, float* new_zero) {
      storage_.round(exponent_, 1, new_scale, new_zero);
    });
  }

  // Takes over the choices [16] of panel p, and the errors that go with them.
  void apply(int64_t g, int64_t p, const RefitChoice* choices) {
    float* scale = w_.scale_of(p) + g * kPanelLanes;
    float* zero = w_.zero_of(p) + g * kPanelLanes;
    for (int64_t j = 0; j < n_; ++j) {
      const int64_t c = column(j), row = p * kPanelLanes;
      float* error = feedback_.error() + feedback_.position_of(c) * stride_ + row;
      const float* weight = w_.weights_of(p) + c * kPanelLanes;
      const uint8_t* exact = w_.exact ? w_.exact_of(p) + c * kPanelLanes : nullptr;
      for (int64_t i = 0; i < kPanelLanes; ++i) {
        const bool same = !(choices[i].change < 0.0) || (exact && exact[i]);
        const float unit = at(d_, j)[row + i] + (zero[i] - choices[i].zero);
        const float now = same ? error[i] : weight[i] - unit * choices[i].scale;
        at(change_, j)[row + i] = now - error[i];
        error[i] = now;
      }
    }
    for (int64_t i = 0; i < kPanelLanes; ++i) {
      scale[i] = choices[i].scale;
      zero[i] = choices[i].zero;
    }
  }

  int64_t update_rows(int64_t g) {
    std::atomic<int64_t> changed = 0;
    parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        RefitSums sums[kPanelLanes];
        RefitChoice choices[kPanelLanes];
        sums_of(p, sums);
        for (int64_t i = 0; i < kPanelLanes; ++i) {
          const int64_t of_lane = g * kPanelLanes + i;
          choices[i] = choose(sums[i], w_.scale_of(p)[of_lane], w_.zero_of(p)[of_lane]);
          feedback_.loss()[static_cast<size_t>(p * kPanelLanes + i)] += choices[i].change;
          changed += choices[i].change < 0.0 && i < w_.rows_of(p);
        }
        apply(g, p, choices);
      }
    });
    return changed;
  }

  int64_t update_tensor() {
    std::vector<RefitSums> sums(static_cast<size_t>(w_.width()));
    for (int64_t p = 0; p < w_.panels; ++p) sums_of(p, sums.data() + p * kPanelLanes);
    RefitSums all{};
    for (int64_t r = 0; r < w_.rows; ++r) all.add(sums[static_cast<size_t>(r)]);
    const float scale = w_.scale[0], zero = w_.zero[0];
    RefitChoice choices[kPanelLanes];
    std::fill_n(choices, kPanelLanes, choose(all, scale, zero));
    if (!(choices[0].change < 0.0)) return 0;
    for (int64_t p = 0; p < w_.panels; ++p) apply(0, p, choices);
    for (size_t r = 0; r < sums.size(); ++r)
      feedback_.loss()[r] += sums[r].change(choices[0].by(scale), choices[0].shift(zero));
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
  int64_t low_ = 0, size_ = 0;               // columns of the section
  int64_t first_ = 0, n_ = 0;                // of the group, counted from low_
  std::vector<float> rows_of_h_;             // [size, cols] by position
  std::vector<float> inside_;                // [size, size]; dead inputs zero
  std::vector<float> ones_;                  // [n] H times ones, of the group
  std::vector<float> he_, d_, hd_, change_;  // [size, rows at stride_]
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
