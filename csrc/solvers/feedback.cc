#include "solvers/feedback.h"

#include <algorithm>
#include <chrono>
#include <numeric>

namespace bitfold {
namespace {

class Clock {
 public:
  explicit Clock(double* sum) : sum_(sum), start_(std::chrono::steady_clock::now()) {}
  ~Clock() {
    *sum_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  double* sum_;
  std::chrono::steady_clock::time_point start_;
};

// Rows a multiple of 1 KiB apart would fall on the same few lines of the cache.
int64_t stride_for(int64_t width) { return width % 256 == 0 ? width + 16 : width; }

}  // namespace

Feedback::Feedback(PanelMatrix* w, const Factorization& f, const LinearAlgebra& algebra,
                   const Parallel& parallel)
    : w_(*w),
      f_(f),
      algebra_(algebra),
      parallel_(parallel),
      n_(w->cols),
      width_(w->width()),
      stride_(stride_for(width_)),
      position_(static_cast<size_t>(n_)),
      error_(new float[static_cast<size_t>(n_ * stride_)]),
      loss_(static_cast<size_t>(width_)) {
  for (int64_t a = 0; a < n_; ++a)
    position_[static_cast<size_t>(f.column[static_cast<size_t>(a)])] = a;
}

bool Feedback::is_dead(int64_t position) const {
  return f_.dead[static_cast<size_t>(f_.column[static_cast<size_t>(position)])] != 0;
}

double Feedback::total_loss() const {
  return std::accumulate(loss_.begin(), loss_.begin() + w_.rows, 0.0);
}

// What the errors of all finished columns (of all columns, if again) add up to for a section.
void Feedback::correct(const float* matrix, bool again, const Section& section) {
  const Clock clock(&seconds.products);
  const int64_t rows = section.high - section.low, done = n_ - section.high;
  correction_.resize(static_cast<size_t>(rows * stride_));
  if (again) {
    change_.resize(correction_.size());
    algebra_.gemm(false, false, rows, width_, n_, 1.0f, matrix + section.low * n_, n_, error(),
                  stride_, 0.0f, correction_.data(), stride_);
  } else if (done > 0) {
    algebra_.gemm(true, false, rows, width_, done, 1.0f, matrix + section.high * n_ + section.low,
                  n_, error() + section.high * stride_, stride_, 0.0f, correction_.data(), stride_);
  } else {
    std::fill(correction_.begin(), correction_.end(), 0.0f);
  }
}

// Adds what was rounded since, in the same section.
void Feedback::correct_block(const float* matrix, bool again, const Section& section,
                             const Block& block) {
  if (block.high == section.high) return;
  const Clock clock(&seconds.products);
  const float* errors = again ? change_.data() + (block.high - section.low) * stride_
                              : error() + block.high * stride_;
  algebra_.gemm(true, false, block.high - block.low, width_, section.high - block.high, 1.0f,
                matrix + block.high * n_ + block.low, n_, errors, stride_, 1.0f,
                correction_.data() + (block.low - section.low) * stride_, stride_);
}

// A group longer than a block is a section of its own, so that at its start `correction_` is
// complete for all of it.
void Feedback::start_group(const float* matrix, const Section& section, const Block& block,
                           const ChooseScales& choose, const std::vector<float>& of_column) {
  const Clock clock(&seconds.scales);
  const int64_t n = block.high - block.group_low;
  const int64_t group = f_.column[static_cast<size_t>(block.group_low)] / w_.group_size;
  parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<size_t>(n * kPanelLanes)), importance(values.size());
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t a = block.group_low + j;
        const int64_t c = f_.column[static_cast<size_t>(a)];
        const float factor = 1.0f / matrix[a * n_ + a];
        const float* sum = correction_.data() + (a - section.low) * stride_ + p * kPanelLanes;
        const float* weight = w_.weights_of(p) + c * kPanelLanes;
        const uint8_t* exact = w_.exact ? w_.exact_of(p) + c * kPanelLanes : nullptr;
        const float h = of_column[static_cast<size_t>(c)];
        for (int64_t i = 0; i < kPanelLanes; ++i) {
          const bool counts = !exact || !exact[i];
          const auto at = static_cast<size_t>(j * kPanelLanes + i);
          values[at] = counts ? weight[i] + factor * sum[i] : 0.0f;
          importance[at] = counts ? h : 0.0f;
        }
      }
      choose(values.data(), importance.data(), n, w_.scale_of(p) + group * kPanelLanes,
             w_.zero_of(p) + group * kPanelLanes);
    }
  });
}

void Feedback::round_block(const float* matrix, bool again, const Section& section,
                           const Block& block) {
  const int64_t count = block.high - block.low;
  const Clock clock(&seconds.columns);
  float factor[kFeedbackColumns], cost[kFeedbackColumns];
  int32_t column[kFeedbackColumns], group[kFeedbackColumns];
  std::vector<float> inside(static_cast<size_t>(count * count));
  for (int64_t k = 0; k < count; ++k) {
    const int64_t a = block.high - 1 - k;
    const float own = matrix[a * n_ + a];
    factor[k] = 1.0f / own;
    cost[k] = is_dead(a) ? 0.0f : again ? own : own * own;
    column[k] = f_.column[static_cast<size_t>(a)];
    group[k] = static_cast<int32_t>(column[k] / w_.group_size);
    for (int64_t j = 0; j < k; ++j)
      inside[static_cast<size_t>(j * count + k)] =
          matrix[(block.high - 1 - j) * n_ + a] * factor[k];
  }
  const FeedbackColumns columns{count, inside.data(), factor, cost, column, group};
  const int64_t last = (block.high - 1 - section.low) * stride_;
  parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float sum[kPanelLanes] = {};
      const int64_t at = p * kPanelLanes;
      w_.k.feed_back(
          w_.encoding, columns,
          {w_.weights_of(p), w_.scale_of(p), w_.zero_of(p), w_.exact_of(p), w_.books_of(p),
           -stride_, correction_.data() + last + at, error() + (block.high - 1) * stride_ + at,
           again ? change_.data() + last + at : nullptr, w_.codes_of(p), sum});
      for (int64_t i = 0; i < kPanelLanes; ++i) loss_[static_cast<size_t>(at + i)] += sum[i];
    }
  });
}

void Feedback::pass(const float* matrix, bool again, const std::vector<Section>& all,
                    const ChooseScales& choose, const std::vector<float>& importance) {
  for (const Section& section : all) {
    correct(matrix, again, section);
    for (const Block& block : section.blocks) {
      correct_block(matrix, again, section, block);
      if (choose && block.group_low >= 0) start_group(matrix, section, block, choose, importance);
      round_block(matrix, again, section, block);
    }
  }
}

void Feedback::solve() {
  std::fill(loss_.begin(), loss_.end(), 0.0);
  pass(f_.lower.get(), /*again=*/false, plan_sections(n_), nullptr, {});
}

void Feedback::solve(const ChooseScales& choose, const std::vector<float>& importance) {
  std::fill(loss_.begin(), loss_.end(), 0.0);
  pass(f_.lower.get(), /*again=*/false, plan_sections_by_group(f_.column, w_.group_size), choose,
       importance);
}

void Feedback::sweep() { pass(f_.hessian.get(), /*again=*/true, plan_sections(n_), nullptr, {}); }

void Feedback::measure() {
  parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t c = 0; c < n_; ++c) {
        float unit[kPanelLanes];
        w_.decode(p, c, unit);
        const float* scale = w_.scale_of(p) + c / w_.group_size * kPanelLanes;
        const float* weight = w_.weights_of(p) + c * kPanelLanes;
        const uint8_t* exact = w_.exact ? w_.exact_of(p) + c * kPanelLanes : nullptr;
        float* to = error() + position_of(c) * stride_ + p * kPanelLanes;
        for (int64_t i = 0; i < kPanelLanes; ++i)
          to[i] = exact && exact[i] ? 0.0f : weight[i] - unit[i] * scale[i];
      }
    }
  });
  std::fill(loss_.begin(), loss_.end(), 0.0);
  for (int64_t low = 0; low < n_; low += kSectionColumns) {
    const Section section{low, std::min(n_, low + kSectionColumns), {}};
    correct(f_.hessian.get(), /*again=*/true, section);
    parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t a = low; a < section.high; ++a) {
        if (is_dead(a)) continue;
        const float* product = correction_.data() + (a - low) * stride_;
        for (int64_t r = begin * kPanelLanes; r < end * kPanelLanes; ++r)
          loss_[static_cast<size_t>(r)] +=
              static_cast<double>(error()[a * stride_ + r]) * product[r];
      }
    });
  }
}

}  // namespace bitfold
