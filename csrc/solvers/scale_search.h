// Scale and zero point of groups of weights: from their extremes, or by the squared error that
// rounding with them leaves.
#pragma once

#include "cpu/kernel_table.h"

namespace bitfold {

// Up to sixteen groups of equally many weights, wherever they are, one to a lane.
class GroupProbe {
 public:
  virtual ~GroupProbe() = default;
  virtual double total(int lane) const = 0;  // number (or summed importance) of its weights
  // As the kernels of the same names (cpu/kernel_table.h), over whole groups.
  virtual void errors(int64_t count, const float* scale, const float* zero,
                      float* errors) const = 0;
  // The choice of least error, of up to kMaxChoices, and that error; low, high [16] the extremes.
  virtual void best_choice(const float* low, const float* high, int64_t count, const float* scale,
                           const float* zero, float* best_scale, float* best_zero,
                           float* least) const;
  virtual void fit(const float* scale, const float* zero, SpanFits* fits) const = 0;
};

// scale [groups] and zero [groups] from the extremes low [groups], high [groups].
void round_scales(const KernelTable& k, const Encoding& encoding, int64_t groups, const float* low,
                  const float* high, float* scale, float* zero);

// The same for the lanes of a probe: tries shrunken ranges, then alternates least squares for the
// scale with new codes, never accepting a larger error.
void search_scales(const KernelTable& k, const Encoding& encoding, const GroupProbe& probe,
                   const float* low, const float* high, float* scale, float* zero);

}  // namespace bitfold
