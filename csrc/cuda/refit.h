// Refitting of scales on a GPU, kernel by kernel (solvers/refit.h, which solvers/cuda/ leads
// through).
#pragma once

#include "cuda/rounding.h"

namespace bitfold::cuda {

// Whole groups: columns [low, low + size). Arrays are [size, rows] at the stride of the matrix,
// unless said otherwise.
struct RefitSection {
  int64_t low, size;
  float* rows_of_h;  // [size, cols] of the Hessian by position
  float* inside;     // [size, size] among the columns of the section; dead inputs zero
  float* ones;       // [size] what it adds up to over the columns of a group
  float* units;      // unit decodes
  float *he, *hd;    // H times the errors, and, within groups, times the units
  float* change;     // of the errors
};

// rows_of_h, inside, ones.
Status gather_hessian(const RoundingMatrix& w, const ColumnPlaces& places, const float* hessian,
                      const RefitSection& section, cudaStream_t stream);
Status decode_units(const RoundingMatrix& w, const DeviceEncoding& encoding,
                    const RefitSection& section, cudaStream_t stream);
// One group of it: its scales in every row, errors, losses and `change`; *changed counts rows.
// exponent: of fp16 scales, null for others.
Status refit_group(const RoundingMatrix& w, const DeviceEncoding& encoding,
                   const ColumnPlaces& places, const RefitSection& section, int64_t group,
                   const int8_t* exponent, float* error, double* loss, unsigned long long* changed,
                   cudaStream_t stream);

}  // namespace bitfold::cuda
