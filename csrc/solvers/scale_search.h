// Scale and zero point of one group: from its extremes, or by the squared error that rounding with them leaves.
#pragma once

#include <functional>

#include "core/format.h"
#include "cpu/kernel_table.h"

namespace bitfold {

struct ScaleChoice {
  float scale;
  float zero;  // integer grids; a codebook has none
};

// fit(scale, zero): the sums of SpanFit for these on the group at hand, which may be larger than one span.
using FitFunction = std::function<SpanFit(float scale, float zero)>;

ScaleChoice round_scale(const Format& format, const SpanStats& stats);

// Tries shrunken ranges, then alternates least squares for the scale with new codes, never accepting a larger error.
// n is the number of weights in the group.
ScaleChoice search_scale(const Format& format, const SpanStats& stats, int64_t n, const FitFunction& fit);

}  // namespace bitfold
