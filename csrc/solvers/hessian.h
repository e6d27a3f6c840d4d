// Running means of products of activations: what calibrated solvers know of a layer's input.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"
#include "solvers/linear_algebra.h"

namespace bitfold {

struct Counts {
  int64_t counted = 0;  // rows that went into the mean
  int64_t dropped = 0;  // rows left out for a NaN or an infinity
};

// H <- (tokens H + sum of x x^T over the rows of x) / (tokens + rows): the same for every split in
// batches. Rows whose mask [rows] is 0 are passed over. Of H [n, n] only blocks on and below the
// diagonal are updated, 9/16 of a full product; finish_hessian fills in the rest.
template <class T>
Counts update_hessian(const KernelTable& k, const MatrixView& x, const uint8_t* mask,
                      int64_t tokens, const LinearAlgebra& algebra, const Parallel& parallel,
                      T* hessian);

// Copies the lower triangle to the upper one.
template <class T>
void finish_hessian(int64_t n, const Parallel& parallel, T* hessian);

// C <- (tokens C + sum of (x_float - x) x^T) / (tokens + rows), all of it.
template <class T>
Counts update_cross(const KernelTable& k, const MatrixView& x_float, const MatrixView& x,
                    const uint8_t* mask, int64_t tokens, const LinearAlgebra& algebra,
                    const Parallel& parallel, T* cross);

}  // namespace bitfold
