// GPTQ on a GPU: as solvers/gptq.h, with weight, Hessian, `cross`, `exact` and buffers in its
// memory. The same choices by the same sums, added in other orders: the same loss to 1e-3, not the
// same bits.
#pragma once

#include "solvers/cuda/gpu.h"
#include "solvers/gptq.h"

namespace bitfold {

// Whether a GPU does it: not for learned levels, nor where one scale for the tensor is searched or
// refitted.
bool can_solve_on_gpu(const Format& format, ScaleChoice scales, int refits);

// Waits for the GPU three times: for the diagonal of H, which orders the columns, for the outcome
// of the factorization, and for the report; once more where sweeps or refits follow, and in every
// round of refits.
Status gptq_quantize(const Gpu& gpu, const Format& format, const MatrixView& w,
                     const HessianView& h, const GptqOptions& options, void* const* buffers,
                     GptqReport* report);

Status refit_packed(const Gpu& gpu, const Format& format, const MatrixView& w, const HessianView& h,
                    double damping, int sweeps, void* const* buffers, double* before,
                    double* after);

}  // namespace bitfold
