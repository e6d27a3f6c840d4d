// Half-quadratic quantization (Badri and Shaji, 2023): zero points that minimize sum |w -
// decoded|^p with p < 1, which lets outliers keep their error. Needs no data.
#pragma once

#include "core/view.h"
#include "solvers/cpu.h"
#include "solvers/options.h"

namespace bitfold {

// As quantize() with Method::kSearch, whose scales stay; then, group by group,
//   r = w / s + z - code,  e = sign(r) max(|r| - |r|^(p-1) / beta, 0),  z <- mean(code - w / s + e)
// until mean |r| grows, keeping the zero point with the least, as it will be stored. Two departures
// from the published code, which starts from min-max scales and stops by the mean over the tensor:
// searched scales halve the squared error at 2 bits, and r is counted in steps instead of in
// weights, so that the shrinkage acts whatever the size of the weights.
// Formats with real zero points of groups or rows only. Same bits on every instruction set and for
// every number of threads.
Status hqq_solve(const Cpu& cpu, const Format& format, const HqqOptions& options,
                 const MatrixView& w, void* const* buffers);

}  // namespace bitfold
