// Floats to codes, and a group's extremes to its scale: what kernels decide with, and GoogleTest on
// the host. The same operations in the same order as the vector kernels
// (cpu/kernels/quantize-inl.h, search-inl.h), one weight at a time, so the same bits; nvcc fuses
// none of them (-fmad=false).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/codebook.h"
#include "core/float16.h"
#include "core/format.h"
#include "core/scale_coding.h"
#include "cuda/decode.h"

namespace bitfold::cuda {

// Decisions between the levels of a codebook: [-1, 1] is cut in bins so narrow that none holds more
// than one pivot. A bin says which code lies on either side of it.
inline constexpr int kBins = 32;
struct alignas(8) Bin {
  float pivot;     // infinite where there is none
  uint32_t codes;  // below or at the pivot, and, shifted left by 8, above it
};

// How a group is encoded; travels with the launch.
struct DeviceEncoding {
  int bits;
  Zero zero;                 // of integer grids
  bool book;                 // else an integer grid
  Bin bins[kBins];           // of a codebook
  float levels[kMaxLevels];  // by code
};

// Of formats with fixed levels or an integer grid.
DeviceEncoding make_encoding(const Format& format);

BITFOLD_HOST_DEVICE inline float lesser(float a, float b) { return a < b ? a : b; }
BITFOLD_HOST_DEVICE inline float greater(float a, float b) { return a > b ? a : b; }

// As core/scale_coding.h's.
BITFOLD_HOST_DEVICE inline float inverse_scale(float scale) {
  return 1.0f / (scale < 0.0f ? lesser(scale, -1e-38f) : greater(scale, 1e-38f));
}

// Where the bin of a number in [-1, 1], or a rounding beyond, lies in a table that has each bin
// once for every lane of half a warp: its number times kBinStride bytes. Near 2^16 the last bit of
// a float is 1/128, so the sum's bits from the seventh on are the bin.
inline constexpr int kBinLanes = 16, kBinStride = 128;
static_assert(kBinLanes * sizeof(Bin) == kBinStride);
inline constexpr float kBinsPerOne = 15.9375f, kBinOfZero = 15.96875f;  // 1 and -1 well inside
BITFOLD_HOST_DEVICE inline uint32_t bin_place(float scaled) {
  return bits_from_float(fmaf(scaled, kBinsPerOne, 65536.0f + kBinOfZero)) &
         ((kBins - 1) * kBinStride);
}
// The bin of any number.
BITFOLD_HOST_DEVICE inline uint32_t bin_of(float scaled) {
  return bin_place(lesser(greater(scaled, -1.0f), 1.0f)) / kBinStride;
}
BITFOLD_HOST_DEVICE inline unsigned code_in(const Bin& bin, float scaled) {
  return (scaled > bin.pivot ? bin.codes >> 8 : bin.codes) & 255u;
}

// clamp(round(w / scale + zero), 0, top), as a float.
BITFOLD_HOST_DEVICE inline float grid_code(float w, float inverse, float zero, float top) {
  return lesser(greater(rintf(w * inverse + zero), 0.0f), top);
}

inline constexpr float kLargestFloat = 3.402823466e38f;

struct ScaleAndZero {
  float scale, zero;
};

// A range [low, high] with a zero point, integer or real.
BITFOLD_HOST_DEVICE inline ScaleAndZero grid_of_range(int bits, Zero zero, float low, float high) {
  const float top = static_cast<float>((1 << bits) - 1);
  float step = (high - low) / top;
  if (step > kLargestFloat) step = high / top - low / top;  // the range of +-3e38 is no float
  if (zero == Zero::kInt) {
    const float code = lesser(greater(rintf(low * -1.0f / step), 0.0f), top);
    return {step > 0.0f ? step : 0.0f, step > 0.0f ? code : 0.0f};
  }
  // Below 2048 fp16 resolves whole codes.
  const float magnitude = greater(fabsf(low), fabsf(high));
  const float scale = greater(step, magnitude * (1.0f / 1024));
  return {scale, scale > 0.0f ? low * -1.0f / scale : 0.0f};
}

// Scale and zero point of a group with the extremes low and high, each end shrunk by a factor.
BITFOLD_HOST_DEVICE inline ScaleAndZero choose_scale(int bits, Zero zero, bool book, float low,
                                                     float high, float shrink_low,
                                                     float shrink_high) {
  const float absmax = greater(fabsf(low), fabsf(high));
  const float half = static_cast<float>(1 << (bits - 1));
  if (book) return {absmax * shrink_high, 0.0f};
  switch (zero) {
    case Zero::kNone:
      return {absmax * shrink_high / (half - 1.0f), half};
    case Zero::kMidrise:
      return {absmax * shrink_high / (half - 0.5f), half - 0.5f};
    case Zero::kInt:  // the zero point is a code, so the range must hold zero
      return grid_of_range(bits, zero, lesser(low, 0.0f) * shrink_low,
                           greater(high, 0.0f) * shrink_high);
    case Zero::kFloat:
      break;
  }
  const float middle = low * 0.5f + high * 0.5f;
  return grid_of_range(bits, zero, middle + (low - middle) * shrink_low,
                       middle + (high - middle) * shrink_high);
}

inline constexpr float kFarthestZero = 2048.0f;

// Whether a choice may be taken at all; its error counts as infinite otherwise.
BITFOLD_HOST_DEVICE inline bool is_possible(ScaleAndZero choice) {
  return choice.scale > 0.0f && !(choice.scale > kLargestFloat) &&
         !(fabsf(choice.zero) > kFarthestZero);
}

// Sums over a group for fixed codes: d the codes' values in units of the scale.
struct FitSums {
  float error, wd, dd, w, d;
};

// One unknown (scale), or two (scale and a real zero point), by least squares. n: what all weights
// count together, their number unless some count more than others.
BITFOLD_HOST_DEVICE inline ScaleAndZero fitted_scale(Zero zero, double n, const FitSums& sums,
                                                     float zero_now) {
  if (zero != Zero::kFloat) return {sums.dd > 0.0f ? sums.wd / sums.dd : 0.0f, zero_now};
  const double mean_d = sums.d / n, mean_w = sums.w / n;
  const double variance = sums.dd / n - mean_d * mean_d;
  const double scale = variance > 0.0 ? (sums.wd / n - mean_d * mean_w) / variance : 0.0;
  if (!(scale > 0.0)) return {0.0f, 0.0f};
  return {static_cast<float>(scale), static_cast<float>(zero_now + mean_d - mean_w / scale)};
}

// Powers of two of the tensor: core/scale_coding.h's choose_exponent, with what ilogb and ldexp do.
BITFOLD_HOST_DEVICE inline int exponent_of_range(float largest, float smallest) {
  if (largest == 0.0f || (smallest >= 6.103515625e-5f && largest <= 65504.0f)) return 0;
  const uint32_t bits = bits_from_float(largest);
  int exponent = static_cast<int>(bits >> 23) - 127;
  if (exponent == -127) {  // subnormal: the place of the highest bit
    exponent = -150;
    for (uint32_t rest = bits; rest; rest >>= 1) ++exponent;
  }
  const int wanted = exponent - 14;
  return wanted < -126 ? -126 : wanted > 127 ? 127 : wanted;
}

// Scales and zero points as a reader would decode them (ScaleStorage::round of the CPU), where that
// hangs on nothing else: all but double quantization.
struct StoredRounding {
  bool halves;       // scales are fp16 times a power of two
  bool zero_halves;  // zero points are fp16

  BITFOLD_HOST_DEVICE void apply(int exponent, float* scale, float* zero) const {
    constexpr float kLargestHalf = 65504.0f;
    if (halves) {
      const float fraction = lesser(*scale * power_of_two(-exponent), kLargestHalf);
      *scale = from_half(to_half(fraction)) * power_of_two(exponent);
    }
    if (zero_halves)
      *zero = from_half(to_half(lesser(greater(*zero, -kLargestHalf), kLargestHalf)));
  }
};

// ---- double quantization ----

// Steps of the map from 65536 equidistant points to codes: point i has as many codes below it as
// there are steps <= i.
struct DynamicSteps {
  uint16_t step[255];
};
DynamicSteps make_dynamic_steps();

BITFOLD_HOST_DEVICE inline int point_of(float x) {
  constexpr int kPoints = 65536;
  const float at = (x + 1.0f) * 0.5f * (kPoints - 1) + 0.5f;
  return static_cast<int>(at > 0.0f ? lesser(at, static_cast<float>(kPoints - 1)) : 0.0f);
}

BITFOLD_HOST_DEVICE inline unsigned code_of_point(const uint16_t* step, int point) {
  unsigned code = 0;
  for (unsigned bit = 128; bit > 0; bit /= 2)
    if (step[code + bit - 1] <= point) code += bit;
  return code;
}

BITFOLD_HOST_DEVICE inline float inverse_of_block(float largest) {
  return largest > 0.0f ? 1.0f / greater(largest, 1e-38f) : 0.0f;
}

// Whether the sum of n floats of these magnitudes (smallest: of those that are not zero) is exact
// in float64 in whatever order: every partial sum is a multiple of the last place of the smallest,
// and fits 53 bits of them. The CPU adds one after the other; so may threads, then, together.
BITFOLD_HOST_DEVICE inline bool sums_exactly(float largest, float smallest, int64_t n) {
  if (largest == 0.0f) return true;
  const int top = static_cast<int>(bits_from_float(largest) >> 23);
  const int bottom = static_cast<int>(bits_from_float(smallest) >> 23);
  int count_bits = 0;
  while (int64_t{1} << count_bits < n) ++count_bits;
  return (top < 1 ? 1 : top) - (bottom < 1 ? 1 : bottom) + 24 + count_bits <= 53;
}

// As ScaleStorage::follow_scales: a real zero point after its scale was rounded.
BITFOLD_HOST_DEVICE inline float follow_scale(int bits, float zero, float wanted, float stored) {
  if (wanted == 0.0f || stored == 0.0f) return zero;
  const float middle = static_cast<float>((1 << bits) - 1) / 2;
  const float moved = middle - (middle - zero) * (wanted / stored);
  return moved < -65504.0f ? -65504.0f : moved > 65504.0f ? 65504.0f : moved;
}

// ---- a unit: eight codes of a row, packed ----

// `codes` one after the other, absent ones zero. Bytes little-endian in low (and high for 8 bits);
// 3 bits: the plane of two bits in low, the plane of one bit in high.
struct PackedUnit {
  uint32_t low, high;
};

template <int kBits>
BITFOLD_HOST_DEVICE inline PackedUnit pack_unit(const unsigned* codes) {
  PackedUnit unit{0, 0};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int j = 0; j < 8; ++j) {
    if constexpr (kBits == 8) (j < 4 ? unit.low : unit.high) |= codes[j] << (8 * (j % 4));
    // In from the top, the first of each byte last: one instruction a code.
    if constexpr (kBits == 4) unit.low = unit.low >> 4 | codes[j ^ 1] << 28;
    if constexpr (kBits <= 3) unit.low |= (codes[j] & 3u) << (8 * (j / 4) + 6 - 2 * (j % 4));
    if constexpr (kBits == 3) unit.high |= codes[j] >> 2 << (7 - j);
  }
  return unit;
}

// Writes the bytes that n <= 8 codes at column `col` (a multiple of 8) take; any address.
template <int kBits>
BITFOLD_HOST_DEVICE inline void store_unit(uint8_t* row, int64_t plane_bytes, int64_t col, int n,
                                           PackedUnit unit) {
  constexpr int kLowBits = kBits == 3 ? 2 : kBits;
  uint8_t* to = row + col * kLowBits / 8;
  for (int b = 0; b < (n * kLowBits + 7) / 8; ++b)
    to[b] = static_cast<uint8_t>((b < 4 ? unit.low : unit.high) >> (8 * (b % 4)));
  if constexpr (kBits == 3) row[plane_bytes + col / 8] = static_cast<uint8_t>(unit.high);
}

}  // namespace bitfold::cuda
