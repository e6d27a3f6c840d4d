// How scales are stored: fp16 times one power of two per tensor, or eight-bit codes with fp32 per
// 256 of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/parallel.h"

namespace bitfold {

// The inverse that encoders multiply with; bitsandbytes' clamp keeps an all-zero block finite.
float inverse_of(float scale);

// Extremes of the magnitudes of what is to be stored as fp16 times one power of two.
struct MagnitudeRange {
  float largest = 0.0f;
  float smallest = INFINITY;  // of those that are not zero

  void add(const float* values, int64_t n);
  void add(const MagnitudeRange& other);
};

// The exponent e such that values / 2^e fit fp16 well: 0 whenever every nonzero magnitude is a
// normal half, else the one that puts the largest at the top of the range.
int choose_exponent(const MagnitudeRange& range);

// halves[i] = fp16(values[i] / 2^exponent).
void encode_halves(const float* values, int64_t n, int exponent, uint16_t* halves);

// QLoRA's double quantization: offset = mean (in float64, so that it depends on nothing but the
// values), then blocks of 256: absmax[b] = max |s - offset|, codes = nearest entry of kDynamicMap
// to (s - offset) / absmax[b] on a grid of 65536 points. codes [n], absmax [ceil(n / 256)], offset
// [1].
void double_quantize(const float* scales, int64_t n, uint8_t* codes, float* absmax, float* offset,
                     const Parallel& parallel = run_serially);
void double_dequantize(const uint8_t* codes, const float* absmax, float offset, int64_t n,
                       float* scales);

}  // namespace bitfold
