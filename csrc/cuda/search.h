// The search for a scale, on whatever says which errors a choice leaves: a kernel's lanes, or a
// loop in a test.
#pragma once

#include "core/shrinks.h"
#include "cuda/encode.h"

namespace bitfold::cuda {

// As solvers/scale_search.cc: shrunken ranges, then least squares and new codes in turn, never
// accepting a larger error. probe.error(choice) and probe.fit(choice) are the sums over the group,
// whose weights lie between low and high and count `total` together. On a GPU all lanes that share
// a group hold the same numbers and branch alike.
template <class Probe>
BITFOLD_HOST_DEVICE inline ScaleAndZero search_scale(const DeviceEncoding& e,
                                                     const Shrinks& shrinks, const Probe& probe,
                                                     float low, float high, double total) {
  ScaleAndZero best{};
  float least = 0.0f, whole = 0.0f;
  for (int c = 0; c < shrinks.count; ++c) {
    const ScaleAndZero choice =
        choose_scale(e.bits, e.zero, e.book, low, high, shrinks.low[c], shrinks.high[c]);
    const float error = probe.error(choice);
    if (c == 0) whole = choice.scale;
    if (c == 0 || error < least) {
      best = choice;
      least = error;
    }
  }
  bool active = whole > 0.0f;  // else all weights are zero, or too small for the range of a float
  FitSums sums = probe.fit(best);
  for (int step = 0; step < kRefinements; ++step) {
    ScaleAndZero next = fitted_scale(e.zero, total, sums, best.zero);
    active = active && next.scale > 0.0f && !(next.scale > kLargestFloat) &&
             fabsf(next.zero) <= kFarthestZero;
    if (!active) next = best;
    if (step + 1 < kRefinements) {
      sums = probe.fit(next);
    } else {
      sums.error = probe.error(next);
    }
    active = active && sums.error < least;
    if (active) {
      best = next;
      least = sums.error;
    }
  }
  return best;
}

}  // namespace bitfold::cuda
