// LLM.int8() (arXiv 2208.07339): columns of the activations that hold large values are multiplied
// as floats, all others as 8-bit integers with one scale per row of x and of w.
#pragma once

#include "core/format.h"
#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// Whether a format has what is needed: 8-bit codes around 128, one scale for a whole row.
bool suits_mixed_product(const Format& format);

// Which columns of x are outliers.
struct MixedColumns {
  float threshold;         // those with any |x| above it, in any row, or NaN; used where
  bool fixed;              // false;
  const int64_t* columns;  // else these, ascending
  int64_t count;
};

// y [m, w.rows] = x [m, w.cols] * w^T + bias [w.rows] or null. With J the outlier columns and c_i
// the largest |x[i, j]| outside of J:
//   y[i, r] = sum_{j in J} x[i, j] w[r, j] + scale_r c_i / 127 * sum_{j not in J} q[i, j] (code -
//   128) q[i, j] = round(x[i, j] * 127 / c_i)
// The second sum is exact. Rows of x with NaN or infinity outside of J come out NaN; those whose
// c_i is below 4e-37 count as zero outside of J.
void multiply_mixed(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                    const void* bias, FloatType dtype, const MixedColumns& columns, void* y,
                    const Parallel& parallel);

}  // namespace bitfold
