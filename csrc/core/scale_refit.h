// What the scale of a group, and a real zero point with it, become by least squares in the metric
// of a Hessian, its codes as they are.
#pragma once

#include <cmath>

#include "core/float16.h"

namespace bitfold {

// Sums over a group, of one row or of all: d the unit decode, o ones, e the errors.
struct RefitSums {
  double de, oe, dd, d_o, oo;  // d H e, o H e, d H d, d H o, o H o

  BITFOLD_HOST_DEVICE void add(const RefitSums& other) {
    de += other.de, oe += other.oe, dd += other.dd, d_o += other.d_o, oo += other.oo;
  }
  // Of the loss, when the decoded weights grow by scale * d + shift.
  BITFOLD_HOST_DEVICE double change(double scale, double shift) const {
    return -2.0 * (scale * de + shift * oe) + scale * scale * dd + 2.0 * scale * shift * d_o +
           shift * shift * oo;
  }
};

struct RefitChoice {
  float scale, zero;
  double change;  // of the loss

  // By how much the decoded weights grow: by() * d + shift().
  BITFOLD_HOST_DEVICE double by(float old_scale) const {
    return static_cast<double>(scale) - old_scale;
  }
  BITFOLD_HOST_DEVICE double shift(float old_zero) const {
    return static_cast<double>(scale) * (static_cast<double>(old_zero) - zero);
  }
};

// The best of staying, moving the scale, and, where `moves_zero`, moving both. round(&scale, &zero)
// makes them what they are once they are stored.
template <class Round>
BITFOLD_HOST_DEVICE inline RefitChoice choose_refit(const RefitSums& s, float scale, float zero,
                                                    bool moves_zero, const Round& round) {
  RefitChoice best{scale, zero, 0.0};
  if (!(scale > 0.0f) || !(s.dd > 0.0)) return best;
  const auto consider = [&](double by, double shift) {
    RefitChoice next{static_cast<float>(scale + by), zero, 0.0};
    if (!(next.scale > 0.0f) || next.scale > 3.402823466e38f) return;
    if (shift != 0.0) next.zero = static_cast<float>(zero - shift / next.scale);
    if (!(fabsf(next.zero) <= 2048.0f)) return;
    round(&next.scale, &next.zero);
    next.change = s.change(next.by(scale), next.shift(zero));
    if (next.change < best.change) best = next;
  };
  consider(s.de / s.dd, 0.0);
  const double determinant = s.dd * s.oo - s.d_o * s.d_o;
  if (moves_zero && determinant > 1e-6 * s.dd * s.oo) {
    consider((s.de * s.oo - s.oe * s.d_o) / determinant,
             (s.oe * s.dd - s.de * s.d_o) / determinant);
  }
  return best;
}

}  // namespace bitfold
