#include "solvers/scale_search.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/shrinks.h"

namespace bitfold {
namespace {

constexpr int kLanes = kSpanLanes;

// The factors to try, the same in all lanes.
struct LaneShrinks {
  int count = 0;
  float low[kMaxChoices][kLanes], high[kMaxChoices][kLanes];

  explicit LaneShrinks(const Shrinks& shrinks) : count(shrinks.count) {
    for (int c = 0; c < count; ++c) {
      std::fill_n(low[c], kLanes, shrinks.low[c]);
      std::fill_n(high[c], kLanes, shrinks.high[c]);
    }
  }
};

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
  static const std::vector<LaneShrinks> kShrinks = [] {
    std::vector<LaneShrinks> all;
    for (int bits = 0; bits <= 8; ++bits) {
      all.emplace_back(shrinks_for(bits, false));
      all.emplace_back(shrinks_for(bits, true));
    }
    return all;
  }();
  const LaneShrinks& shrinks =
      kShrinks[static_cast<size_t>(2 * encoding.bits + (asymmetric ? 1 : 0))];

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
