// A weight in units of its scale to the code it is rounded to, with a grid or the bins of a
// codebook in shared memory.
#pragma once

#include "cuda/book.cuh"
#include "cuda/rounding.h"

namespace bitfold::cuda {

template <bool kBook>
struct Rounder {
  const Bin* bins;
  const float* levels;
  float top;

  // The code, and in `unit` what it stands for.
  __device__ unsigned round(float v, float inverse, float zero, float* unit) const {
    if constexpr (kBook) {
      const float scaled = v * inverse;
      const unsigned code = code_in(bins[bin_of(scaled)], scaled);
      *unit = levels[code];
      return code;
    }
    const float code = grid_code(v, inverse, zero, top);
    *unit = code - zero;
    return static_cast<unsigned>(code);
  }
};

// What a code that was chosen stands for, in units of its scale.
__device__ inline float unit_at(const RoundingMatrix& w, const DeviceEncoding& encoding,
                                const float* levels, int64_t col, int64_t row) {
  const unsigned code = w.codes[col * w.stride + row];
  if (encoding.book) return levels[code];
  return static_cast<float>(code) - w.zero[col / w.group_size * w.stride + row];
}

// Called by all threads of a block; both arrays are shared.
template <bool kBook>
__device__ inline Rounder<kBook> make_rounder(const DeviceEncoding& encoding, Bin* bins,
                                              float* levels) {
  if (kBook) {
    fetch_bins(encoding, bins);
    fetch_levels(encoding, levels);
  }
  return {bins, levels, static_cast<float>((1 << encoding.bits) - 1)};
}

}  // namespace bitfold::cuda
