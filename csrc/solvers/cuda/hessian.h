// Running means of products of activations on a GPU: as solvers/hessian.h, all in its memory.
#pragma once

#include "core/view.h"
#include "solvers/cuda/gpu.h"
#include "solvers/hessian.h"

namespace bitfold {

// The updates wait once, to know how many rows count: the mean is weighted by that, and it is
// returned.
template <class T>
Status update_hessian(const Gpu& gpu, const MatrixView& x, const uint8_t* mask, int64_t tokens,
                      T* hessian, Counts* counts);
template <class T>
Status finish_hessian(const Gpu& gpu, int64_t n, T* hessian);
template <class T>
Status update_cross(const Gpu& gpu, const MatrixView& x_float, const MatrixView& x,
                    const uint8_t* mask, int64_t tokens, T* cross, Counts* counts);

}  // namespace bitfold
