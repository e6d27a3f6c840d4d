// What the solvers are asked for, what they report, and whether it fits: on the CPU and on a GPU.
#pragma once

#include <vector>

#include "core/view.h"
#include "solvers/importance.h"

namespace bitfold {

struct Seconds {  // that each part took
  double factor = 0.0, scales = 0.0, products = 0.0, columns = 0.0;
};

struct GptqOptions {
  ColumnOrder order = ColumnOrder::kGiven;
  double damping = 0.01;  // lambda of factorize()
  ScaleChoice scales = ScaleChoice::kDiagonal;
  bool dynamic = false;  // scales of a group from its columns as they are when it is due
  int sweeps = 0;        // of coordinate descent after the column pass
  int refits = 0;        // rounds of refit_scales (two sweeps) and, if sweeps > 0, one more sweep
  const float* cross = nullptr;  // [n, n] E[(x_float - x) x^T]: moves the target of rounding, below
  double alpha = 1.0;            // how far
  const uint8_t* exact = nullptr;  // [out, in]: not 0 where a weight is stored elsewhere
  int64_t measured_rows = 64;      // for the report's direct measurements; all if negative
  bool timed = false;              // fills the report's seconds: a GPU is waited for in between
};

// Losses are sums over rows of e H e^T, H damped unless said otherwise; dead inputs count nothing.
struct GptqReport {
  double loss = 0.0;      // of what is stored, H undamped
  double damped = 0.0;    // of what is stored
  double feedback = 0.0;  // sum of squares that the column pass adds up
  // Of the column pass, from the errors of plain rounding: sum R_kk^2 e_k^2.
  double predicted = 0.0;
  double plain = 0.0;  // rounding without feedback, same scales, H undamped
  double plain_damped = 0.0;
  double measured = 0.0;  // `damped` once more, as tr(E H E^T), of the measured rows
  double tracked = 0.0;   // `damped` of the same rows
  double damping = 0.0;   // lambda used
  double dead = 0.0;      // inputs that are always zero
  double fp64 = 0.0;      // 1 if the factorization took float64
  double fallback = 0.0;  // 1 if H was not positive definite at any lambda: plain rounding
  double measured_rows = 0.0;
  double refitted = 0.0;  // scales that a refit changed
  Seconds seconds;
};
// predicted, plain, plain_damped are of the measured rows, times rows / measured rows.

// Whether sizes and options fit each other; n: of the Hessian [n, n].
Status check_gptq(const Format& format, const MatrixView& w, int64_t n, const GptqOptions& options);

// Panels of sixteen rows that are measured: `measured_rows` or some more, spread evenly over all.
std::vector<int64_t> measured_panels(int64_t panels, int64_t measured_rows);

struct HqqOptions {
  float p = 0.7f;      // of the norm, above 0 and at most 1
  float beta = 10.0f;  // how tightly the auxiliary error follows the residual, in steps of the grid
  float kappa = 1.01f;      // beta grows by this factor each iteration
  int64_t iterations = 10;  // at most; twenty lower the mean |r| by another 0.1 %
};

// Whether the format has such zero points, and the options are within their ranges.
Status check_hqq(const Format& format, const HqqOptions& options);

// Whether a format has ranges of groups or rows to clip, and the weight elements.
Status check_awq_clip(const Format& format, const MatrixView& w);

}  // namespace bitfold
