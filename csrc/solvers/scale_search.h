// Scale and zero point of groups of weights: from their extremes, or by the squared error that
// rounding with them leaves.
#pragma once

#include "cpu/kernel_table.h"

namespace bitfold {

// Groups of weights, wherever they are: spans of a row, or a whole tensor.
class GroupProbe {
 public:
  virtual ~GroupProbe() = default;
  virtual int64_t size(int64_t group) const = 0;
  // As the kernels of the same names (cpu/kernel_table.h), over the whole group.
  virtual void errors(int64_t group, int64_t count, const float* scale, const float* zero,
                      float* errors) const = 0;
  virtual SpanFit fit(int64_t group, ScaleChoice choice) const = 0;
};

// scale [groups] and zero [groups] from the extremes low [groups], high [groups].
void round_scales(const KernelTable& k, const Encoding& encoding, int64_t groups, const float* low,
                  const float* high, float* scale, float* zero);

// Tries shrunken ranges, then alternates least squares for the scale with new codes, never
// accepting a larger error.
void search_scales(const KernelTable& k, const Encoding& encoding, const GroupProbe& probe,
                   int64_t groups, const float* low, const float* high, float* scale, float* zero);

}  // namespace bitfold
