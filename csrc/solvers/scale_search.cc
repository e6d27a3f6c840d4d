#include "solvers/scale_search.h"

#include <algorithm>
#include <cfloat>
#include <cstring>
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

// Four lanes, what every 64-bit CPU has; g++ makes no vectors of loops that choose. Comparisons
// give masks.
constexpr int kFour = 4;
using Four = float __attribute__((vector_size(sizeof(float) * kFour)));
using Mask = int32_t __attribute__((vector_size(sizeof(int32_t) * kFour)));

Four load(const float* p) {
  Four v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
void store(float* p, Four v) { std::memcpy(p, &v, sizeof v); }

// Which lanes may still improve.
struct Active {
  Mask quarter[kLanes / kFour];

  bool any() const {
    const Mask found = quarter[0] | quarter[1] | quarter[2] | quarter[3];
    return (found[0] | found[1] | found[2] | found[3]) != 0;
  }
};

// Least squares for fixed codes: one unknown (scale), or two (scale and a real zero point).
void least_squares(const Encoding& encoding, const GroupProbe& probe, const SpanFits& sums,
                   float* scales, float* zeros) {
  if (encoding.zero != Zero::kFloat) {
    for (int i = 0; i < kLanes; i += kFour) {
      const Four dd = load(sums.dd + i);
      store(scales + i, dd > 0.0f ? load(sums.wd + i) / dd : Four{});
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

Mask is_choice(Four scale, Four zero) {
  constexpr float kFarthestZero = 2048.0f;  // where fp16 ceases to resolve whole codes
  return (scale > 0.0f) & (scale <= FLT_MAX) & (zero <= kFarthestZero) & (zero >= -kFarthestZero);
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
  Active active;
  for (int i = 0; i < kLanes; i += kFour) active.quarter[i / kFour] = load(scales[0] + i) > 0.0f;
  SpanFits sums;
  probe.fit(scale, zero, &sums);
  for (int step = 0; step < kRefinements; ++step) {
    float next_scale[kLanes], next_zero[kLanes];
    std::copy_n(zero, kLanes, next_zero);
    least_squares(encoding, probe, sums, next_scale, next_zero);
    for (int i = 0; i < kLanes; i += kFour) {
      Mask& on = active.quarter[i / kFour];
      on &= is_choice(load(next_scale + i), load(next_zero + i));
      store(next_scale + i, on ? load(next_scale + i) : load(scale + i));
    }
    if (!active.any()) return;
    if (step + 1 < kRefinements) {
      probe.fit(next_scale, next_zero, &sums);
    } else {
      probe.errors(1, next_scale, next_zero, sums.error);
    }
    for (int i = 0; i < kLanes; i += kFour) {
      Mask& on = active.quarter[i / kFour];
      on &= load(sums.error + i) < load(least + i);
      store(scale + i, on ? load(next_scale + i) : load(scale + i));
      store(zero + i, on ? load(next_zero + i) : load(zero + i));
      store(least + i, on ? load(sums.error + i) : load(least + i));
    }
  }
}

}  // namespace bitfold
