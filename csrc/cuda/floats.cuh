// Numbers of one of torch's float types, by index.
#pragma once

#include "core/view.h"
#include "cuda/decode.h"

namespace bitfold::cuda {

template <FloatType kType>
__device__ inline float read(const void* data, int64_t i) {
  if constexpr (kType == FloatType::kFloat32) return __ldg(static_cast<const float*>(data) + i);
  const uint16_t bits = __ldg(static_cast<const uint16_t*>(data) + i);
  return kType == FloatType::kFloat16 ? from_half(bits) : bfloat16_to_float(bits);
}

template <FloatType kType>
__device__ inline void write(void* data, int64_t i, float v) {
  if constexpr (kType == FloatType::kFloat32) {
    static_cast<float*>(data)[i] = v;
  } else {
    static_cast<uint16_t*>(data)[i] = kType == FloatType::kFloat16
                                          ? to_half(v)
                                          : static_cast<uint16_t>(to_bfloat16_pair(v, 0.0f));
  }
}

}  // namespace bitfold::cuda
