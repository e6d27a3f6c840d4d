// Weights of a float matrix of any dtype and strides.
#pragma once

#include "core/view.h"
#include "cuda/decode.h"

namespace bitfold::cuda {

__device__ inline float load_weight(const MatrixView& w, int64_t row, int64_t col) {
  const int64_t at = row * w.row_stride + col * w.col_stride;
  switch (w.dtype) {
    case FloatType::kFloat32:
      return static_cast<const float*>(w.data)[at];
    case FloatType::kFloat16:
      return from_half(static_cast<const uint16_t*>(w.data)[at]);
    default:
      return bfloat16_to_float(static_cast<const uint16_t*>(w.data)[at]);
  }
}

// Whether eight weights that start at a multiple of eight can be read sixteen bytes at a time.
inline bool is_aligned(const MatrixView& w) {
  return w.col_stride == 1 && w.cols % 8 == 0 && reinterpret_cast<uintptr_t>(w.data) % 16 == 0 &&
         w.row_stride * size_of(w.dtype) % 16 == 0;
}

// Eight neighbours, as they lie: what a thread has in flight before it needs them.
template <FloatType kType>
struct Eight {
  uint4 words[kType == FloatType::kFloat32 ? 2 : 1];

  // Of an aligned matrix.
  __device__ void load(const MatrixView& w, int64_t row, int64_t col) {
    const char* from = static_cast<const char*>(w.data) +
                       (row * w.row_stride + col) * (kType == FloatType::kFloat32 ? 4 : 2);
    words[0] = __ldg(reinterpret_cast<const uint4*>(from));
    if constexpr (kType == FloatType::kFloat32)
      words[1] = __ldg(reinterpret_cast<const uint4*>(from) + 1);
  }
  __device__ void clear() {
    words[0] = make_uint4(0, 0, 0, 0);
    if constexpr (kType == FloatType::kFloat32) words[1] = words[0];
  }
  __device__ void to_floats(float* v) const {
    const uint32_t bits[] = {words[0].x, words[0].y, words[0].z, words[0].w};
    if constexpr (kType == FloatType::kFloat32) {
      const uint32_t more[] = {words[1].x, words[1].y, words[1].z, words[1].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = __uint_as_float(bits[i]);
        v[4 + i] = __uint_as_float(more[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kType == FloatType::kFloat16) {
          v[2 * i] = from_half(static_cast<uint16_t>(bits[i]));
          v[2 * i + 1] = from_half(static_cast<uint16_t>(bits[i] >> 16));
        } else {
          v[2 * i] = __uint_as_float(bits[i] << 16);
          v[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
        }
      }
    }
  }
};

}  // namespace bitfold::cuda
