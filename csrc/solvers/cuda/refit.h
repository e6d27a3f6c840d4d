// Scales fitted again on a GPU: as solvers/refit.h.
#pragma once

#include "cuda/refit.h"
#include "solvers/cuda/feedback.h"
#include "solvers/cuda/scales.h"

namespace bitfold {

// Formats with scales of groups or rows. `feedback` must hold the errors and losses of what is in
// the matrix, and does so again afterwards.
class GpuRefit {
 public:
  GpuRefit(GpuRun* run, const GpuLayer& layer, GpuFeedback* feedback, GpuScales* scales);

  // Returns the number of (row, group) pairs that changed, for which it waits.
  int64_t run(int sweeps);

 private:
  void sweep();
  void begin_section(int64_t low, int64_t high);
  void update(int64_t group);

  GpuRun& run_;
  const LinearAlgebra& algebra_;
  const GpuLayer& layer_;
  const cuda::RoundingMatrix& w_;
  GpuFeedback& feedback_;
  GpuScales& scales_;
  const int64_t at_once_;  // groups to a section
  cuda::RefitSection section_{};
  unsigned long long* changed_;
};

}  // namespace bitfold
