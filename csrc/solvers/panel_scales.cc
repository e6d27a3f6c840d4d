#include "solvers/panel_scales.h"

#include <algorithm>

#include "solvers/row_reader.h"
#include "solvers/scale_search.h"

namespace bitfold {
namespace {

class WeightedBlock : public GroupProbe {
 public:
  WeightedBlock(const KernelTable& k, const Encoding& encoding, const float* block,
                const float* importance, int64_t n)
      : k_(k), encoding_(encoding), block_(block), importance_(importance), n_(n) {}

  double total(int lane) const override {
    double sum = 0.0;
    for (int64_t j = 0; j < n_; ++j) sum += importance_[j * kPanelLanes + lane];
    return sum;
  }
  void errors(int64_t count, const float* scale, const float* zero, float* errors) const override {
    k_.weighted_errors(encoding_, block_, importance_, n_, count, scale, zero, errors);
  }
  void fit(const float* scale, const float* zero, SpanFits* fits) const override {
    k_.weighted_fit(encoding_, block_, importance_, n_, scale, zero, fits);
  }

 private:
  const KernelTable& k_;
  const Encoding& encoding_;
  const float *block_, *importance_;
  const int64_t n_;
};

// Weights and importance of a panel's lanes; what is stored elsewhere counts for nothing.
class PanelReader {
 public:
  PanelReader(const PanelMatrix& w, const std::vector<float>& importance) : w_(w) {
    importance_.resize(static_cast<size_t>(w.cols * kPanelLanes));
    for (int64_t i = 0; i < w.cols * kPanelLanes; ++i)
      importance_[static_cast<size_t>(i)] = importance[static_cast<size_t>(i / kPanelLanes)];
    everywhere_ = importance_;
    if (w.exact) weights_.resize(importance_.size());
  }

  void read(int64_t p) {
    p_ = p;
    const uint8_t* exact = w_.exact_of(p);
    if (!exact) return;
    for (size_t i = 0; i < weights_.size(); ++i) {
      weights_[i] = exact[i] ? 0.0f : w_.weights_of(p)[i];
      importance_[i] = exact[i] ? 0.0f : everywhere_[i];
    }
  }
  const float* weights() const { return w_.exact ? weights_.data() : w_.weights_of(p_); }
  const float* importance() const { return importance_.data(); }

 private:
  const PanelMatrix& w_;
  std::vector<float> weights_, importance_, everywhere_;
  int64_t p_ = 0;
};

// All rows as one group, the same in every lane.
class WeightedTensor : public GroupProbe {
 public:
  WeightedTensor(const PanelMatrix& w, const std::vector<float>& importance,
                 const Parallel& parallel)
      : w_(w), importance_(importance), parallel_(parallel) {}

  double total(int /*lane*/) const override {
    double sum = 0.0;
    for (float h : importance_) sum += h;
    return sum * static_cast<double>(w_.rows);
  }
  void errors(int64_t count, const float* scale, const float* zero, float* errors) const override {
    const int64_t stride = count * kPanelLanes;
    std::vector<float> of_panels(static_cast<size_t>(w_.panels * stride));
    each([&](int64_t p, const PanelReader& panel) {
      w_.k.weighted_errors(w_.encoding, panel.weights(), panel.importance(), w_.cols, count, scale,
                           zero, of_panels.data() + p * stride);
    });
    for (int64_t c = 0; c < count; ++c) {
      const double sum =
          over_rows([&](int64_t p) { return of_panels.data() + p * stride + c * kPanelLanes; });
      std::fill_n(errors + c * kPanelLanes, kPanelLanes, static_cast<float>(sum));
    }
  }
  void fit(const float* scale, const float* zero, SpanFits* fits) const override {
    std::vector<SpanFits> of_panels(static_cast<size_t>(w_.panels));
    each([&](int64_t p, const PanelReader& panel) {
      w_.k.weighted_fit(w_.encoding, panel.weights(), panel.importance(), w_.cols, scale, zero,
                        &of_panels[static_cast<size_t>(p)]);
    });
    for (auto sums : {&SpanFits::error, &SpanFits::wd, &SpanFits::dd, &SpanFits::w, &SpanFits::d}) {
      const double sum =
          over_rows([&](int64_t p) { return of_panels[static_cast<size_t>(p)].*sums; });
      std::fill_n(fits->*sums, kPanelLanes, static_cast<float>(sum));
    }
  }

 private:
  template <class Body>
  void each(const Body& body) const {
    parallel_(w_.panels, grain(w_.cols * kPanelLanes, kGrainWeights),
              [&](int64_t begin, int64_t end) {
                PanelReader panel(w_, importance_);
                for (int64_t p = begin; p < end; ++p) {
                  panel.read(p);
                  body(p, panel);
                }
              });
  }
  template <class Lanes>
  double over_rows(const Lanes& lanes) const {
    double sum = 0.0;
    for (int64_t r = 0; r < w_.rows; ++r) sum += lanes(r / kPanelLanes)[r % kPanelLanes];
    return sum;
  }

  const PanelMatrix& w_;
  const std::vector<float>& importance_;
  const Parallel& parallel_;
};

void choose_for_tensor(PanelMatrix* w, bool search, const std::vector<float>& importance,
                       const Parallel& parallel) {
  float low[kPanelLanes], high[kPanelLanes], scale[kPanelLanes], zero[kPanelLanes];
  PanelReader panel(*w, importance);
  for (int64_t p = 0; p < w->panels; ++p) {
    float least[kPanelLanes], most[kPanelLanes];
    panel.read(p);
    extremes(panel.weights(), w->cols, least, most);
    for (int64_t i = 0; i < kPanelLanes; ++i) {
      low[0] = p + i == 0 ? least[0] : std::min(low[0], least[i]);
      high[0] = p + i == 0 ? most[0] : std::max(high[0], most[i]);
    }
  }
  std::fill_n(low, kPanelLanes, low[0]);
  std::fill_n(high, kPanelLanes, high[0]);
  round_scales(w->k, w->encoding, kPanelLanes, low, high, scale, zero);
  if (search) {
    search_scales(w->k, w->encoding, WeightedTensor(*w, importance, parallel), low, high, scale,
                  zero);
  }
  std::fill(w->scale.begin(), w->scale.end(), scale[0]);
  std::fill(w->zero.begin(), w->zero.end(), zero[0]);
}

}  // namespace

void extremes(const float* block, int64_t n, float* low, float* high) {
  std::copy_n(block, kPanelLanes, low);
  std::copy_n(block, kPanelLanes, high);
  for (int64_t j = 1; j < n; ++j) {
    for (int64_t i = 0; i < kPanelLanes; ++i) {
      const float v = block[j * kPanelLanes + i];
      low[i] = v < low[i] ? v : low[i];
      high[i] = v > high[i] ? v : high[i];
    }
  }
}

void choose_group_scales(const KernelTable& k, const Encoding& encoding, bool search,
                         const float* block, const float* importance, int64_t n, float* scale,
                         float* zero) {
  float low[kPanelLanes], high[kPanelLanes];
  extremes(block, n, low, high);
  if (search) {
    search_scales(k, encoding, WeightedBlock(k, encoding, block, importance, n), low, high, scale,
                  zero);
  } else {
    round_scales(k, encoding, kPanelLanes, low, high, scale, zero);
  }
}

void choose_scales(PanelMatrix* w, bool search, const std::vector<float>& importance,
                   const Parallel& parallel) {
  if (w->format.grouping == Grouping::kTensor)
    return choose_for_tensor(w, search, importance, parallel);
  parallel(w->panels, grain(w->cols * kPanelLanes, kGrainWeights), [&](int64_t begin, int64_t end) {
    PanelReader panel(*w, importance);
    for (int64_t p = begin; p < end; ++p) {
      panel.read(p);
      for (int64_t g = 0; g < w->groups; ++g) {
        const int64_t first = g * w->group_size;
        const int64_t n = std::min(w->group_size, w->cols - first);
        choose_group_scales(w->k, w->encoding, search, panel.weights() + first * kPanelLanes,
                            panel.importance() + first * kPanelLanes, n,
                            w->scale_of(p) + g * kPanelLanes, w->zero_of(p) + g * kPanelLanes);
      }
    }
  });
}

}  // namespace bitfold
