// GPTQ: a matrix into the buffers of a Format such that its products with the inputs that a Hessian
// stands for change least.
#pragma once

#include "solvers/cpu.h"
#include "solvers/feedback.h"
#include "solvers/options.h"

namespace bitfold {

// `buffers` as in quantize(). With `cross` the matrix that is rounded is W + alpha W C H^-1, the
// least-squares answer to min ||W x_float - Q x||^2 over real Q; losses are then around it.
Status gptq_quantize(const Cpu& cpu, const Format& format, const MatrixView& w,
                     const HessianView& h, const GptqOptions& options, void* const* buffers,
                     GptqReport* report);

// Fits the scales of `packed` again (solvers/refit.h) into `buffers`, which hold a copy of it.
Status refit_packed(const Cpu& cpu, const Format& format, const MatrixView& w, const HessianView& h,
                    double damping, int sweeps, void* const* buffers, double* before,
                    double* after);

}  // namespace bitfold
