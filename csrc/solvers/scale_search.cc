#include "solvers/scale_search.h"

#include <algorithm>
#include <cmath>

namespace bitfold {
namespace {

constexpr int kSymmetricSteps = 16;  // geometric, from the whole range down to `floor`
constexpr int kRangeSteps = 5;       // per end of an asymmetric range: 25 pairs
constexpr int kRefinements = 3;

// How far a range may be clipped: the fewer levels, the more it pays. On 2^20 Gaussian draws the
// optimum lies well inside.
float symmetric_floor(int bits) {
  return bits >= 8 ? 0.8f : bits == 4 ? 0.4f : bits == 3 ? 0.3f : 0.2f;
}
float shrink_ratio(int bits) {
  return std::pow(symmetric_floor(bits), 1.0f / (kSymmetricSteps - 1));
}
float range_floor(int bits) { return bits >= 8 ? 0.95f : bits == 4 ? 0.6f : 0.4f; }

float absmax_of(const SpanStats& stats) {
  return std::max(std::fabs(stats.min), std::fabs(stats.max));
}

// A range [low, high] as scale and zero point.
ScaleChoice grid_of_range(const Format& format, float low, float high) {
  const float top = static_cast<float>((1 << format.bits()) - 1);
  float scale = (high - low) / top;
  if (std::isinf(scale)) scale = high / top - low / top;  // the range of ±3e38 is no float
  if (format.zero == Zero::kInt) {
    if (!(scale > 0.0f)) return {0.0f, 0.0f};
    return {scale, std::clamp(std::nearbyintf(-low / scale), 0.0f, top)};
  }
  // Real zero point: keep it below 2048, where fp16 still resolves whole codes, by not letting the
  // step get too fine.
  const float magnitude = std::max(std::fabs(low), std::fabs(high));
  const float limited = std::max(scale, magnitude / 1024.0f);
  return {limited, limited > 0.0f ? -low / limited : 0.0f};
}

ScaleChoice choice_for_shrink(const Format& format, const SpanStats& stats, float shrink_low,
                              float shrink_high) {
  const float half = static_cast<float>(1 << (format.bits() - 1));
  if (format.family() != Family::kInteger) return {absmax_of(stats) * shrink_high, 0.0f};
  switch (format.zero) {
    case Zero::kNone:
      return {absmax_of(stats) * shrink_high / (half - 1.0f), half};
    case Zero::kMidrise:
      return {absmax_of(stats) * shrink_high / (half - 0.5f), half - 0.5f};
    case Zero::kInt:  // the zero point is a code, so the range must hold zero
      return grid_of_range(format, std::min(stats.min, 0.0f) * shrink_low,
                           std::max(stats.max, 0.0f) * shrink_high);
    case Zero::kFloat: {
      const float middle = stats.min / 2 + stats.max / 2;
      return grid_of_range(format, middle + (stats.min - middle) * shrink_low,
                           middle + (stats.max - middle) * shrink_high);
    }
  }
  return {0.0f, 0.0f};
}

// Least squares for fixed codes: one unknown (scale), or two (scale and a real zero point).
ScaleChoice least_squares(const Format& format, const SpanStats& stats, int64_t n,
                          const ScaleChoice& from, const SpanFit& sums) {
  if (format.family() != Family::kInteger || format.zero != Zero::kFloat) {
    return {sums.dd > 0.0f ? sums.wd / sums.dd : 0.0f, from.zero};
  }
  const double count = static_cast<double>(n);
  const double mean_d = sums.d / count, mean_w = stats.sum / count;
  const double variance = sums.dd / count - mean_d * mean_d;
  const double scale = variance > 0.0 ? (sums.wd / count - mean_d * mean_w) / variance : 0.0;
  if (!(scale > 0.0)) return {0.0f, 0.0f};
  return {static_cast<float>(scale), static_cast<float>(from.zero + mean_d - mean_w / scale)};
}

}  // namespace

ScaleChoice round_scale(const Format& format, const SpanStats& stats) {
  return choice_for_shrink(format, stats, 1.0f, 1.0f);
}

ScaleChoice search_scale(const Format& format, const SpanStats& stats, int64_t n,
                         const GroupProbe& probe) {
  ScaleChoice best = round_scale(format, stats);
  if (!(best.scale > 0.0f)) return best;
  float least = probe.error(best);
  const auto consider = [&](const ScaleChoice& choice) {
    if (!(choice.scale > 0.0f) || !std::isfinite(choice.scale) || std::fabs(choice.zero) > 2048.0f)
      return false;
    const float error = probe.error(choice);
    if (!(error < least)) return false;
    best = choice;
    least = error;
    return true;
  };
  const bool asymmetric = format.zero == Zero::kInt || format.zero == Zero::kFloat;
  if (asymmetric) {
    const float step = (1.0f - range_floor(format.bits())) / (kRangeSteps - 1);
    for (int i = 0; i < kRangeSteps; ++i) {
      for (int j = 0; j < kRangeSteps; ++j) {
        if (i + j > 0) consider(choice_for_shrink(format, stats, 1.0f - step * i, 1.0f - step * j));
      }
    }
  } else {
    static const float kRatios[] = {shrink_ratio(2), shrink_ratio(3), shrink_ratio(4),
                                    shrink_ratio(8)};
    const float ratio = kRatios[format.bits() == 8 ? 3 : format.bits() - 2];
    float shrink = 1.0f;
    for (int i = 1; i < kSymmetricSteps; ++i) {
      shrink *= ratio;
      consider(choice_for_shrink(format, stats, shrink, shrink));
    }
  }
  for (int i = 0; i < kRefinements; ++i) {
    if (!consider(least_squares(format, stats, n, best, probe.fit(best)))) break;
  }
  return best;
}

}  // namespace bitfold
