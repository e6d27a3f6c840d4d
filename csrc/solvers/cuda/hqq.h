// HQQ on a GPU: as solvers/hqq.h, with weight and buffers in its memory. The same scales, zero
// points of the same loss: powers differ in their last places.
#pragma once

#include "solvers/cuda/gpu.h"
#include "solvers/hqq.h"

namespace bitfold {

Status hqq_solve(const Gpu& gpu, const Format& format, const HqqOptions& options,
                 const MatrixView& w, void* const* buffers);

}  // namespace bitfold
