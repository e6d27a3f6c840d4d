#include "solvers/scale_search.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace bitfold {
namespace {

constexpr int kSymmetricSteps = 16;  // geometric, from the whole range down to `floor`
constexpr int kRangeSteps = 5;       // per end of an asymmetric range: 25 pairs
constexpr int kRefinements = 3;
constexpr int kMaxChoices = kRangeSteps * kRangeSteps;
static_assert(kSymmetricSteps <= kMaxChoices);
constexpr int kLanes = kSpanLanes;

// How far a range may be clipped: the fewer levels, the more it pays. On 2^20 Gaussian draws the
// optimum lies well inside.
float symmetric_floor(int bits) {
  return bits >= 8 ? 0.8f : bits == 4 ? 0.4f : bits == 3 ? 0.3f : 0.2f;
}
float range_floor(int bits) { return bits >= 8 ? 0.95f : bits == 4 ? 0.6f : 0.4f; }

// The factors to try, the whole range first.
struct Shrinks {
  int count = 0;
  float low[kMaxChoices][kLanes], high[kMaxChoices][kLanes];  // the same in all lanes

  void add(float shrink_low, float shrink_high) {
    std::fill_n(low[count], kLanes, shrink_low);
    std::fill_n(high[count++], kLanes, shrink_high);
  }
};

Shrinks shrinks_for(int bits, bool asymmetric) {
  Shrinks shrinks;
  if (asymmetric) {
    const float step = (1.0f - range_floor(bits)) / (kRangeSteps - 1);
    for (int i = 0; i < kRangeSteps; ++i) {
      for (int j = 0; j < kRangeSteps; ++j) shrinks.add(1.0f - step * i, 1.0f - step * j);
    }
  } else {
    const float ratio = std::pow(symmetric_floor(bits), 1.0f / (kSymmetricSteps - 1));
    float shrink = 1.0f;
    for (int i = 0; i < kSymmetricSteps; ++i, shrink *= ratio) shrinks.add(shrink, shrink);
  }
  return shrinks;
}

// Least squares for fixed codes: one unknown (scale), or two (scale and a real zero point).
void least_squares(const Encoding& encoding, const GroupProbe& probe, const SpanFits& sums,
                   float* scales, float* zeros) {
  for (int i = 0; i < kLanes; ++i) {
    if (encoding.zero != Zero::kFloat) {
      scales[i] = sums.dd[i] > 0.0f ? sums.wd[i] / sums.dd[i] : 0.0f;
      continue;
    }
    const double count = probe.total(i);
    const double mean_d = sums.d[i] / count, mean_w = sums.w[i] / count;
    const double variance = sums.dd[i] / count - mean_d * mean_d;
    const double scale = variance > 0.0 ? (sums.wd[i] / count - mean_d * mean_w) / variance : 0.0;
    scales[i] = scale > 0.0 ? static_cast<float>(scale) : 0.0f;
    zeros[i] = scale > 0.0 ? static_cast<float>(zeros[i] + mean_d - mean_w / scale) : 0.0f;
  }
}

bool is_choice(float scale, float zero) {
  return scale > 0.0f && std::isfinite(scale) && std::fabs(zero) <= 2048.0f;
}

}  // namespace

void round_scales(const KernelTable& k, const Encoding& encoding, int64_t groups, const float* low,
                  const float* high, float* scale, float* zero) {
  static const std::vector<float> whole(256, 1.0f);
  const auto most = static_cast<int64_t>(whole.size());
  for (int64_t g = 0; g < groups; g += most) {
    k.choices(encoding, std::min(most, groups - g), low + g, high + g, whole.data(), whole.data(),
              scale + g, zero + g);
  }
}

void search_scales(const KernelTable& k, const Encoding& encoding, const GroupProbe& probe,
                   const float* low, const float* high, float* scale, float* zero) {
  const bool asymmetric = encoding.zero == Zero::kInt || encoding.zero == Zero::kFloat;
  static const std::vector<Shrinks> kShrinks = [] {
    std::vector<Shrinks> all;
    for (int bits = 0; bits <= 8; ++bits) {
      all.push_back(shrinks_for(bits, false));
      all.push_back(shrinks_for(bits, true));
    }
    return all;
  }();
  const Shrinks& shrinks = kShrinks[static_cast<size_t>(2 * encoding.bits + (asymmetric ? 1 : 0))];

  float scales[kMaxChoices][kLanes], zeros[kMaxChoices][kLanes], errors[kMaxChoices][kLanes];
  for (int c = 0; c < shrinks.count; ++c) {
    k.choices(encoding, kLanes, low, high, shrinks.low[c], shrinks.high[c], scales[c], zeros[c]);
  }
  probe.errors(shrinks.count, scales[0], zeros[0], errors[0]);
  float least[kLanes];
  int best[kLanes] = {};
  std::copy_n(errors[0], kLanes, least);
  for (int c = 1; c < shrinks.count; ++c) {
    for (int i = 0; i < kLanes; ++i) {
      best[i] = errors[c][i] < least[i] ? c : best[i];
      least[i] = errors[c][i] < least[i] ? errors[c][i] : least[i];
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    scale[i] = scales[best[i]][i];
    zero[i] = zeros[best[i]][i];
  }

  // All weights zero, or too small for the range of a float: nothing to improve.
  bool active[kLanes];
  std::transform(scales[0], scales[0] + kLanes, active, [](float s) { return s > 0.0f; });
  SpanFits sums;
  probe.fit(scale, zero, &sums);
  for (int step = 0; step < kRefinements; ++step) {
    float next_scale[kLanes], next_zero[kLanes];
    std::copy_n(zero, kLanes, next_zero);
    least_squares(encoding, probe, sums, next_scale, next_zero);
    for (int i = 0; i < kLanes; ++i) {
      active[i] = active[i] && is_choice(next_scale[i], next_zero[i]);
      if (!active[i]) next_scale[i] = scale[i];
    }
    if (std::none_of(active, active + kLanes, [](bool one) { return one; })) return;
    if (step + 1 < kRefinements) {
      probe.fit(next_scale, next_zero, &sums);
    } else {
      probe.errors(1, next_scale, next_zero, sums.error);
    }
    for (int i = 0; i < kLanes; ++i) {
      active[i] = active[i] && sums.error[i] < least[i];
      scale[i] = active[i] ? next_scale[i] : scale[i];
      zero[i] = active[i] ? next_zero[i] : zero[i];
      least[i] = active[i] ? sums.error[i] : least[i];
    }
  }
}

}  // namespace bitfold
