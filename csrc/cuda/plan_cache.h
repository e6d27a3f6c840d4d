// Plans that were made before: looking for the cheapest cut takes longer than a launch.
#pragma once

#include "cuda/linear_plan.h"

namespace bitfold::cuda {

// As plan_mma; remembers the last few per thread.
bool cached_plan(const PackedView& w, int64_t m, const GpuLimits& gpu, MmaPlan* plan);

}  // namespace bitfold::cuda
