#include "cuda/level_factor.h"

#include <cmath>
#include <cstring>

#include "core/float16.h"

namespace bitfold::cuda {
namespace {

float search(const float* levels, int count) {
  constexpr int kFactors = 1024;
  double least = INFINITY;
  float best = 1.0f;
  for (int i = 0; i < kFactors; ++i) {
    const float factor = 1.0f + static_cast<float>(i) / kFactors;
    double error = 0.0;
    for (int code = 0; code < count; ++code) {
      const double off =
          bfloat16_to_float(float_to_bfloat16(levels[code] * factor)) / double{factor} -
          levels[code];
      error += off * off;
    }
    if (error < least) {
      least = error;
      best = factor;
    }
  }
  return best;
}

}  // namespace

float level_factor(const DeviceWeight& w, FloatType dtype) {
  if (dtype != FloatType::kBFloat16 || w.view.family != Family::kFixedCodebook) return 1.0f;
  // A model has one codebook or two.
  struct Known {
    float levels[kMaxLevels];
    int bits;
    float factor;
  };
  thread_local Known known[2] = {};
  thread_local int next = 0;
  for (const Known& k : known)
    if (k.bits == w.view.bits && !memcmp(k.levels, w.levels, sizeof k.levels)) return k.factor;
  Known& k = known[next ^= 1];
  memcpy(k.levels, w.levels, sizeof k.levels);
  k.bits = w.view.bits;
  return k.factor = search(w.levels, 1 << w.view.bits);
}

}  // namespace bitfold::cuda
