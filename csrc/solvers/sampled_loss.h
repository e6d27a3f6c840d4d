// The loss of some rows measured directly, as products with the Hessian: what the running sums of
// the solver and its prediction are held against.
#pragma once

#include "solvers/feedback.h"

namespace bitfold {

// Sums over the rows that were measured; dead inputs are left out.
struct SampledLoss {
  double rows = 0.0;
  double loss = 0.0;       // e H e^T, H as it was given
  double added = 0.0;      // what damping adds to it
  double predicted = 0.0;  // e_k^2 R_kk^2 of plain rounding: what feedback will leave of it
  double tracked = 0.0;    // what `feedback` says of the same rows
};

// Of the errors that `feedback` holds, or without it of plain rounding. About `most_rows` rows
// spread evenly, all where that is negative.
SampledLoss sample_loss(PanelMatrix* w, const Factorization& f, const HessianView& h,
                        int64_t most_rows, Feedback* feedback, const LinearAlgebra& algebra,
                        const Parallel& parallel);

}  // namespace bitfold
