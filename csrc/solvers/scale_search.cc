#include "solvers/scale_search.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/float16.h"

namespace bitfold {
namespace {

constexpr int kSymmetricSteps = 16;  // geometric, from the whole range down to `floor`
constexpr int kRangeSteps = 5;       // per end of an asymmetric range: 25 pairs
constexpr int kRefinements = 3;
static_assert(kSymmetricSteps <= kMaxChoices && kRangeSteps * kRangeSteps <= kMaxChoices);

// How far a range may be clipped: the fewer levels, the more it pays. On 2^20 Gaussian draws the
// optimum lies well inside.
float symmetric_floor(int bits) {
  return bits >= 8 ? 0.8f : bits == 4 ? 0.4f : bits == 3 ? 0.3f : 0.2f;
}
float range_floor(int bits) { return bits >= 8 ? 0.95f : bits == 4 ? 0.6f : 0.4f; }

// The factors to try, the whole range first.
struct Shrinks {
  int count = 0;
  float low[kMaxChoices], high[kMaxChoices];

  void add(float shrink_low, float shrink_high) {
    low[count] = shrink_low;
    high[count++] = shrink_high;
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

// The first of the smallest. Errors are not negative, so their bits ascend as they do, and a NaN
// comes last; bits above an index make one number whose minimum takes no unforeseeable branch.
int index_of_least(const float* errors, int count) {
  if (std::isnan(errors[0])) return 0;
  uint64_t least = ~uint64_t{0};
  for (int i = 0; i < count; ++i) {
    least = std::min(least, uint64_t{bits_from_float(errors[i])} << 32 | static_cast<uint64_t>(i));
  }
  return static_cast<int>(least & 0xffffffffu);
}

// Least squares for fixed codes: one unknown (scale), or two (scale and a real zero point).
ScaleChoice least_squares(const Encoding& encoding, int64_t n, const ScaleChoice& from,
                          const SpanFit& sums) {
  if (encoding.zero != Zero::kFloat) {
    return {sums.dd > 0.0f ? sums.wd / sums.dd : 0.0f, from.zero};
  }
  const double count = static_cast<double>(n);
  const double mean_d = sums.d / count, mean_w = sums.w / count;
  const double variance = sums.dd / count - mean_d * mean_d;
  const double scale = variance > 0.0 ? (sums.wd / count - mean_d * mean_w) / variance : 0.0;
  if (!(scale > 0.0)) return {0.0f, 0.0f};
  return {static_cast<float>(scale), static_cast<float>(from.zero + mean_d - mean_w / scale)};
}

bool is_choice(const ScaleChoice& choice) {
  return choice.scale > 0.0f && std::isfinite(choice.scale) && std::fabs(choice.zero) <= 2048.0f;
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
                   int64_t groups, const float* low, const float* high, float* scale, float* zero) {
  const bool asymmetric = encoding.zero == Zero::kInt || encoding.zero == Zero::kFloat;
  static const Shrinks kShrinks[2][9] = {{{},
                                          {},
                                          shrinks_for(2, false),
                                          shrinks_for(3, false),
                                          shrinks_for(4, false),
                                          {},
                                          {},
                                          {},
                                          shrinks_for(8, false)},
                                         {{},
                                          {},
                                          shrinks_for(2, true),
                                          shrinks_for(3, true),
                                          shrinks_for(4, true),
                                          {},
                                          {},
                                          {},
                                          shrinks_for(8, true)}};
  const Shrinks& shrinks = kShrinks[asymmetric ? 1 : 0][encoding.bits];

  struct Active {  // a group that least squares may still improve
    int64_t group;
    float error;
    SpanFit sums;
  };
  std::vector<Active> active;
  active.reserve(static_cast<size_t>(groups));
  for (int64_t g = 0; g < groups; ++g) {
    float lows[kMaxChoices], highs[kMaxChoices];
    float scales[kMaxChoices], zeros[kMaxChoices], errors[kMaxChoices];
    std::fill_n(lows, shrinks.count, low[g]);
    std::fill_n(highs, shrinks.count, high[g]);
    k.choices(encoding, shrinks.count, lows, highs, shrinks.low, shrinks.high, scales, zeros);
    int best = 0;
    if (scales[0] > 0.0f) {  // else all weights are zero, or too small for a float's range
      probe.errors(g, shrinks.count, scales, zeros, errors);
      best = index_of_least(errors, shrinks.count);
      active.push_back({g, errors[best], {}});
    }
    scale[g] = scales[best];
    zero[g] = zeros[best];
  }

  // One step of all groups after the other: what a group's step waits for is hidden by the others.
  for (Active& one : active) one.sums = probe.fit(one.group, {scale[one.group], zero[one.group]});
  for (int step = 0; step < kRefinements; ++step) {
    size_t kept = 0;
    for (const Active& one : active) {
      const int64_t g = one.group;
      const ScaleChoice next =
          least_squares(encoding, probe.size(g), {scale[g], zero[g]}, one.sums);
      if (!is_choice(next)) continue;
      const SpanFit sums = probe.fit(g, next);
      if (!(sums.error < one.error)) continue;
      scale[g] = next.scale;
      zero[g] = next.zero;
      active[kept++] = {g, sums.error, sums};
    }
    active.resize(kept);
  }
}

}  // namespace bitfold
