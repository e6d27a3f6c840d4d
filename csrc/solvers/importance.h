// What an error in each column counts when scales are chosen.
#pragma once

#include <vector>

#include "solvers/factor.h"

namespace bitfold {

enum class ScaleChoice {
  kRange,     // extremes of each group
  kDiagonal,  // least squared error, weighted by the diagonal of the damped Hessian
  kFactor,    // weighted by a mean of that and R_kk^2 (solvers/factor.h)
};

// By column. diagonal: of H, by column; own: R_kk by position, where f.found.
std::vector<float> column_importance(ScaleChoice choice, int bits, const Factorization& f,
                                     const std::vector<double>& diagonal,
                                     const std::vector<float>& own);

}  // namespace bitfold
