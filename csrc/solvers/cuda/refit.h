// Scales fitted again on a GPU: as solvers/refit.h.
#pragma once

#include "solvers/cuda/feedback.h"
#include "solvers/cuda/scales.h"

namespace bitfold {

// Formats with scales of groups or rows. `feedback` must hold the errors and losses of what is in
// the matrix, and does so again afterwards. Returns the number of (row, group) pairs that changed,
// for which it waits.
int64_t refit_scales(GpuRun* run, const GpuLayer& layer, GpuFeedback* feedback, int sweeps,
                     GpuScales* scales);

}  // namespace bitfold
