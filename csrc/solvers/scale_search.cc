#include "solvers/scale_search.h"

#include <algorithm>
#include <cfloat>
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
  if (encoding.zero != Zero::kFloat) {
    for (int i = 0; i < kLanes; ++i) {
      const float scale = sums.wd[i] / sums.dd[i];
      scales[i] = sums.dd[i] > 0.0f ? scale : 0.0f;
    }
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    const double count = probe.total(i);
    const double mean_d = sums.d[i] / count, mean_w = sums.w[i] / count;
    const double variance = sums.dd[i] / count - mean_d * mean_d;
    const double scale = variance > 0.0 ? (sums.wd[i] / count - mean_d * mean_w) / variance : 0.0;
    scales[i] = scale > 0.0 ? static_cast<float>(scale) : 0.0f;
    zeros[i] = scale > 0.0 ? static_cast<float>(zeros[i] + mean_d - mean_w / scale) : 0.0f;
  }
}

// Ones and zeros of 32 bits, in loops without branches: the compiler makes vectors of them.
using Lanes = int32_t[kLanes];

int32_t is_choice(float scale, float zero) {
  return (scale > 0.0f) & (scale <= FLT_MAX) & (std::fabs(zero) <= 2048.0f);
}

bool any(const Lanes& lanes) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= lanes[i];
  return found != 0;
}

}  // namespace

void GroupProbe::best_choice(const float* /*low*/, const float* /*high*/, int64_t count,
                             const float* scale, const float* zero, float* best_scale,
                             float* best_zero, float* least) const {
  float errors[kMaxChoices][kLanes];
  this->errors(count, scale, zero, errors[0]);
  int64_t best[kLanes] = {};
  std::copy_n(errors[0], kLanes, least);
  for (int64_t c = 1; c < count; ++c) {
    for (int i = 0; i < kLanes; ++i) {
      best[i] = errors[c][i] < least[i] ? c : best[i];
      least[i] = errors[c][i] < least[i] ? errors[c][i] : least[i];
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    best_scale[i] = scale[best[i] * kLanes + i];
    best_zero[i] = zero[best[i] * kLanes + i];
  }
}

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

  float scales[kMaxChoices][kLanes], zeros[kMaxChoices][kLanes], least[kLanes];
  for (int c = 0; c < shrinks.count; ++c) {
    k.choices(encoding, kLanes, low, high, shrinks.low[c], shrinks.high[c], scales[c], zeros[c]);
  }
  probe.best_choice(low, high, shrinks.count, scales[0], zeros[0], scale, zero, least);

  // All weights zero, or too small for the range of a float: nothing to improve.
  Lanes active;
  for (int i = 0; i < kLanes; ++i) active[i] = scales[0][i] > 0.0f;
  SpanFits sums;
  probe.fit(scale, zero, &sums);
  for (int step = 0; step < kRefinements; ++step) {
    float next_scale[kLanes], next_zero[kLanes];
    std::copy_n(zero, kLanes, next_zero);
    least_squares(encoding, probe, sums, next_scale, next_zero);
    for (int i = 0; i < kLanes; ++i) {
      active[i] &= is_choice(next_scale[i], next_zero[i]);
      next_scale[i] = active[i] ? next_scale[i] : scale[i];
    }
    if (!any(active)) return;
    if (step + 1 < kRefinements) {
      probe.fit(next_scale, next_zero, &sums);
    } else {
      probe.errors(1, next_scale, next_zero, sums.error);
    }
    for (int i = 0; i < kLanes; ++i) {
      active[i] &= sums.error[i] < least[i];
      scale[i] = active[i] ? next_scale[i] : scale[i];
      zero[i] = active[i] ? next_zero[i] : zero[i];
      least[i] = active[i] ? sums.error[i] : least[i];
    }
  }
}

}  // namespace bitfold
