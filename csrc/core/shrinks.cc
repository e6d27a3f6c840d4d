#include "core/shrinks.h"

#include <cmath>

namespace bitfold {
namespace {

// How far a range may be clipped: the fewer levels, the more it pays. On 2^20 Gaussian draws the
// optimum lies well inside.
float symmetric_floor(int bits) {
  return bits >= 8 ? 0.8f : bits == 4 ? 0.4f : bits == 3 ? 0.3f : 0.2f;
}
float range_floor(int bits) { return bits >= 8 ? 0.95f : bits == 4 ? 0.6f : 0.4f; }

}  // namespace

Shrinks shrinks_for(int bits, bool asymmetric) {
  Shrinks shrinks;
  const auto add = [&](float low, float high) {
    shrinks.low[shrinks.count] = low;
    shrinks.high[shrinks.count++] = high;
  };
  if (asymmetric) {
    const float step = (1.0f - range_floor(bits)) / (kRangeSteps - 1);
    for (int i = 0; i < kRangeSteps; ++i) {
      for (int j = 0; j < kRangeSteps; ++j) add(1.0f - step * i, 1.0f - step * j);
    }
  } else {
    const float ratio = std::pow(symmetric_floor(bits), 1.0f / (kSymmetricSteps - 1));
    float shrink = 1.0f;
    for (int i = 0; i < kSymmetricSteps; ++i, shrink *= ratio) add(shrink, shrink);
  }
  return shrinks;
}

}  // namespace bitfold
