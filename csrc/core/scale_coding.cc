#include "core/scale_coding.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/float16.h"
#include "core/format.h"

namespace bitfold {
namespace {

constexpr float kSmallestNormalHalf = 6.103515625e-5f;  // 2^-14
constexpr float kLargestHalf = 65504.0f;

// The entry of kDynamicMap nearest to x in [-1, 1], taken at the nearest of 65536 equidistant
// points: a look-up, and the very decision that bitsandbytes makes on the CPU (an exact search
// differs from it in 0.2 % of the scales).
constexpr int kPoints = 65536;

const uint8_t* nearest_codes() {
  static const std::vector<uint8_t> table = [] {
    std::vector<uint8_t> codes(kPoints);
    int code = 0;
    for (int i = 0; i < kPoints; ++i) {
      const double point = 2.0 * i / (kPoints - 1) - 1.0;
      while (code < 255 &&
             point > (static_cast<double>(kDynamicMap[code]) + kDynamicMap[code + 1]) / 2)
        ++code;
      codes[static_cast<size_t>(i)] = static_cast<uint8_t>(code);
    }
    return codes;
  }();
  return table.data();
}

uint8_t nearest_code(const uint8_t* table, float x) {
  const float at = (x + 1.0f) * 0.5f * (kPoints - 1) + 0.5f;
  // Also NaN: scales so large that their difference overflowed.
  const float inside = at > 0.0f ? std::min(at, static_cast<float>(kPoints - 1)) : 0.0f;
  return table[static_cast<int>(inside)];
}

// One block of double quantization; returns its absmax.
float quantize_block(const float* scales, int64_t n, float mean, const uint8_t* table,
                     uint8_t* codes) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(scales[i] - mean));
  const float inverse = largest > 0.0f ? 1.0f / std::max(largest, 1e-38f) : 0.0f;
  for (int64_t i = 0; i < n; ++i) codes[i] = nearest_code(table, (scales[i] - mean) * inverse);
  return largest;
}

}  // namespace

// bitsandbytes' lower clamp of absmax; also the reciprocal of a denormal scale stays finite.
// Scales are positive as chosen, but one that was far below its neighbours may come back from its
// 8-bit code a little below zero; divided by what it is, the grid is merely mirrored.
float inverse_of(float scale) {
  return 1.0f / (scale < 0.0f ? std::min(scale, -1e-38f) : std::max(scale, 1e-38f));
}

void MagnitudeRange::add(const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = std::fabs(values[i]);
    largest = std::max(largest, magnitude);
    if (magnitude > 0.0f) smallest = std::min(smallest, magnitude);
  }
}

void MagnitudeRange::add(const MagnitudeRange& other) {
  largest = std::max(largest, other.largest);
  smallest = std::min(smallest, other.smallest);
}

int choose_exponent(const MagnitudeRange& range) {
  if (range.largest == 0.0f ||
      (range.smallest >= kSmallestNormalHalf && range.largest <= kLargestHalf))
    return 0;
  // The largest lands in [2^14, 2^15): 28 binades of normals below it, and no overflow. Kept where
  // 2^e is itself a normal float.
  return std::clamp(std::ilogb(range.largest) - 14, -126, 127);
}

void encode_halves(const float* values, int64_t n, int exponent, uint16_t* halves) {
  for (int64_t i = 0; i < n; ++i) halves[i] = float_to_half(std::ldexp(values[i], -exponent));
}

void double_quantize(const float* scales, int64_t n, uint8_t* codes, float* absmax, float* offset,
                     const Parallel& parallel) {
  // Serial, in order: an addition a scale, the 64th part of what reading the weights takes.
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += scales[i];
  const float mean = n > 0 ? static_cast<float>(sum / static_cast<double>(n)) : 0.0f;
  *offset = mean;

  constexpr int64_t kGrainBlocks = 64;
  const int64_t blocks = (n + kDoubleQuantBlock - 1) / kDoubleQuantBlock;
  const uint8_t* table = nearest_codes();
  parallel(blocks, kGrainBlocks, [=](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kDoubleQuantBlock;
      absmax[block] = quantize_block(scales + begin, std::min(kDoubleQuantBlock, n - begin), mean,
                                     table, codes + begin);
    }
  });
}

void double_dequantize(const uint8_t* codes, const float* absmax, float offset, int64_t n,
                       float* scales) {
  for (int64_t i = 0; i < n; ++i)
    scales[i] = kDynamicMap[codes[i]] * absmax[i / kDoubleQuantBlock] + offset;
}

}  // namespace bitfold
