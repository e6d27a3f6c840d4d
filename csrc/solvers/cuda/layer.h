// The Hessian of a layer on a GPU made ready for rounding: as solvers/factor.h.
#pragma once

#include <vector>

#include "cuda/statistics.h"
#include "solvers/cuda/feedback.h"

namespace bitfold {

// The diagonal of the mean, by column; notes a NaN or an infinity in the mean, in `cross` (may be
// null) and in the weight, in this order, with the words of the CPU. Waits.
std::vector<double> look_at(GpuRun* run, const cuda::MeanView& mean, const float* cross,
                            const MatrixView& weight);

struct GpuFactor {
  Factorization f;         // without the matrices
  std::vector<float> own;  // R_kk by position
  // In the GPU's memory:
  cuda::ColumnPlaces places;
  float *lower, *hessian;    // [cols, cols] by position; hessian null unless kept
  const double* own_on_gpu;  // [cols]
};
// Waits for the answer, which says whether there is more to try.
GpuFactor factorize(GpuRun* run, const cuda::MeanView& mean, const std::vector<double>& diagonal,
                    ColumnOrder order, int64_t group_size, double damping, bool keep_hessian);

// Columns in their own order, none of them dead, for solvers that need no factor.
GpuFactor without_factor(GpuRun* run, int64_t n);

// The weight in the layout of rounding, scales and codes not yet filled. exact [rows, cols] or
// null.
GpuLayer lay_out(GpuRun* run, const Format& format, const MatrixView& weight,
                 const GpuFactor& factor, const uint8_t* exact);

}  // namespace bitfold
