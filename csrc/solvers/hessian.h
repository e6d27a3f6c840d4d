// Running means of products of activations: what calibrated solvers know of a layer's input.
#pragma once

#include "core/view.h"
#include "solvers/cpu.h"

namespace bitfold {

struct Counts {
  int64_t counted = 0;  // rows that went into the mean
  int64_t dropped = 0;  // rows left out for a NaN or an infinity
};

// H <- (tokens H + sum of x x^T over the rows of x) / (tokens + rows): the same for every split in
// batches. Rows whose mask [rows] is 0 are passed over. Of H [n, n] only blocks on and below the
// diagonal are updated, 9/16 of a full product; finish_hessian fills in the rest.
template <class T>
Status update_hessian(const Cpu& cpu, const MatrixView& x, const uint8_t* mask, int64_t tokens,
                      T* hessian, Counts* counts);

// Copies the lower triangle to the upper one.
template <class T>
Status finish_hessian(const Cpu& cpu, int64_t n, T* hessian);

// C <- (tokens C + sum of (x_float - x) x^T) / (tokens + rows), all of it.
template <class T>
Status update_cross(const Cpu& cpu, const MatrixView& x_float, const MatrixView& x,
                    const uint8_t* mask, int64_t tokens, T* cross, Counts* counts);

}  // namespace bitfold
