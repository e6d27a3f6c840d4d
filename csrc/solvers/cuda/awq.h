// AWQ's searches on a GPU: as solvers/awq.h, with weights, Hessians, channels, magnitudes, `exact`,
// buffers and `scale` in its memory. The same loss to 1e-3.
#pragma once

#include "solvers/awq.h"
#include "solvers/cuda/gpu.h"

namespace bitfold {

// Whether a GPU folds what all readers are to be folded into.
bool can_scale_on_gpu(const std::vector<AwqReader>& readers);

// Waits once per reader for its means, and for all losses.
Status awq_scale(const Gpu& gpu, const std::vector<AwqReader>& readers, int64_t channels,
                 float* scale, AwqScale* found);

// Waits for whether all is finite, and for the report.
Status awq_clip(const Gpu& gpu, const Format& format, Method method, const MatrixView& w,
                const float* hessian, const uint8_t* exact, void* const* buffers, AwqClip* found);

}  // namespace bitfold
