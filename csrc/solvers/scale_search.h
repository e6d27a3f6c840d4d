// Scale and zero point of one group: from its extremes, or by the squared error that rounding with
// them leaves.
#pragma once

#include <functional>

#include "core/format.h"
#include "cpu/kernel_table.h"

namespace bitfold {

struct ScaleChoice {
  float scale;
  float zero;  // integer grids; a codebook has none
};

// The group at hand, which may be one span or a whole tensor: its squared error and its
// least-squares sums for a choice.
struct GroupProbe {
  std::function<float(const ScaleChoice&)> error;
  std::function<SpanFit(const ScaleChoice&)> fit;
};

ScaleChoice round_scale(const Format& format, const SpanStats& stats);

// Tries shrunken ranges, then alternates least squares for the scale with new codes, never
// accepting a larger error. n is the number of weights in the group.
ScaleChoice search_scale(const Format& format, const SpanStats& stats, int64_t n,
                         const GroupProbe& probe);

}  // namespace bitfold
