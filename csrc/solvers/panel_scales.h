// Scales and zero points of panels: from the extremes of each group, or by the squared error that
// rounding with them leaves, each weighted by its importance (the diagonal of the Hessian).
#pragma once

#include "solvers/panels.h"

namespace bitfold {

// low [16] and high [16] of block [n, 16].
void extremes(const float* block, int64_t n, float* low, float* high);

// scale [16] and zero [16] of one group: block [n, 16] and importance [n, 16].
void choose_group_scales(const KernelTable& k, const Encoding& encoding, bool search,
                         const float* block, const float* importance, int64_t n, float* scale,
                         float* zero);

// All of them, not yet as they are stored. importance [cols].
void choose_scales(PanelMatrix* w, bool search, const std::vector<float>& importance,
                   const Parallel& parallel);

}  // namespace bitfold
