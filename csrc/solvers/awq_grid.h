// The scales that AWQ tries (solvers/awq.h).
#pragma once

#include <vector>

#include "solvers/awq.h"

namespace bitfold {

struct ScaleCandidate {
  double alpha;
  bool by_weight;
  std::vector<float> scale;  // [channels]
};

// A scale of 1 first, then the grid but for what is not positive and finite. Fails on readers that
// do not fit, or hold a NaN or an infinity, naming them.
Status scale_candidates(const KernelTable& k, const std::vector<AwqReader>& readers,
                        int64_t channels, const Parallel& parallel,
                        std::vector<ScaleCandidate>* all);

}  // namespace bitfold
