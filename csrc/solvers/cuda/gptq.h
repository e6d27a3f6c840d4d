// GPTQ on a GPU: as solvers/gptq.h, with weight, Hessian, `cross`, `exact` and buffers in its
// memory. The same choices by the same sums, added in other orders: the same loss to 1e-3, not the
// same bits.
#pragma once

#include "solvers/cuda/gpu.h"
#include "solvers/gptq.h"

namespace bitfold {

// Whether a GPU does it: not for learned levels, nor for one searched scale for the tensor.
bool can_solve_on_gpu(const Format& format, const GptqOptions& options);

// Waits for the GPU three times: for the diagonal of H, which orders the columns, for the outcome
// of the factorization, and for the report.
Status gptq_quantize(const Gpu& gpu, const Format& format, const MatrixView& w,
                     const HessianView& h, const GptqOptions& options, bool timed,
                     void* const* buffers, GptqReport* report);

}  // namespace bitfold
