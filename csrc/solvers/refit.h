// Scales fitted again in the metric of the Hessian, codes as they are.
#pragma once

#include "solvers/feedback.h"

namespace bitfold {

// Gauss-Seidel over the groups of each row: with d the unit decode of a group and E the present
// errors, the scale moves by (d H E) / (d H d), a real zero point along with it. What it becomes is
// rounded to its stored form first, and kept in rows where that lowers the loss. Double-quantized
// scales are stored once, at the end, and kept only if the whole matrix gains. Learned levels stay
// as they are. `feedback` must hold the errors and losses of what is in the panels, and does so
// again afterwards. Returns the number of (row, group) pairs that changed.
int64_t refit_scales(PanelMatrix* w, Feedback* feedback, const Factorization& f, int sweeps,
                     int exponent, ScaleStorage* storage, const LinearAlgebra& algebra,
                     const Parallel& parallel);

}  // namespace bitfold
