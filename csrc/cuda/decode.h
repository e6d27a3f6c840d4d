// Stored bytes to floats, one place at a time: what kernels call in their inner loops, and
// GoogleTest on the host. The same operations in the same order as csrc/core/view.cc, so the same
// bits; nvcc fuses none of them (-fmad=false).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/bitpack.h"
#include "core/float16.h"
#include "cuda/weight.h"

namespace bitfold::cuda {

// 2^exponent for any byte: below -126 it is subnormal.
BITFOLD_HOST_DEVICE inline float power_of_two(int exponent) {
  return float_from_bits(exponent >= -126 ? static_cast<uint32_t>(exponent + 127) << 23
                                          : 1u << (149 + exponent));
}

// The conversions of core/float16.h; on a GPU one instruction each, with the same result for
// everything but the payload of a NaN.
BITFOLD_HOST_DEVICE inline float from_half(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return half_to_float(bits);
#endif
}

BITFOLD_HOST_DEVICE inline uint16_t to_half(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  return float_to_half(value);
#endif
}

// Two values, the first in the low half of the word.
BITFOLD_HOST_DEVICE inline uint32_t to_half_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return float_to_half(first) | static_cast<uint32_t>(float_to_half(second)) << 16;
#endif
}

BITFOLD_HOST_DEVICE inline uint32_t to_bfloat16_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return float_to_bfloat16(first) | static_cast<uint32_t>(float_to_bfloat16(second)) << 16;
#endif
}

// What a packed weight stores once for the tensor.
struct Values {
  float factor = 1.0f, scale_offset = 0.0f, outlier_factor = 1.0f;
};

BITFOLD_HOST_DEVICE inline Values read_values(const ValueAddresses& at) {
  Values values;
  if (at.exponent) values.factor = power_of_two(*at.exponent);
  if (at.scale_offset) values.scale_offset = *at.scale_offset;
  if (at.outlier_exponent) values.outlier_factor = power_of_two(*at.outlier_exponent);
  return values;
}

// `map`: kDynamicMap, wherever it lies.
BITFOLD_HOST_DEVICE inline float scale_at(const PackedView& view, const Values& values,
                                          const float* map, int64_t row, int64_t group) {
  const int64_t at = row * view.scale_row_stride + group;
  switch (view.scale_kind) {
    case ScaleKind::kFp32:
      return static_cast<const float*>(view.scale)[at];
    case ScaleKind::kFp16:
      return from_half(static_cast<const uint16_t*>(view.scale)[at]) * values.factor;
    case ScaleKind::kDoubleQuant:
      return map[static_cast<const uint8_t*>(view.scale)[at]] *
                 view.scale_absmax[at / kDoubleQuantBlock] +
             values.scale_offset;
    case ScaleKind::kNone:
      break;
  }
  return 1.0f;
}

BITFOLD_HOST_DEVICE inline float zero_at(const PackedView& view, int64_t row, int64_t group) {
  const float middle = static_cast<float>(1 << (view.bits - 1));
  switch (view.zero_kind) {
    case Zero::kNone:
      return middle;
    case Zero::kMidrise:
      return middle - 0.5f;
    case Zero::kInt: {
      const uint8_t* packed = static_cast<const uint8_t*>(view.zero) + row * view.zero_row_bytes;
      return static_cast<float>(extract_code(packed, view.groups, view.bits, group));
    }
    case Zero::kFloat:
      return from_half(
          static_cast<const uint16_t*>(view.zero)[row * view.scale_row_stride + group]);
  }
  return middle;
}

// Learned codebooks.
BITFOLD_HOST_DEVICE inline float learned_level(const PackedView& view, const Values& values,
                                               int64_t row, unsigned code) {
  const int64_t book = (row * view.scale_row_stride) << view.bits;
  return from_half(view.codebook[book + code]) * values.factor;
}

// An integer below 2^23 as a float, without the conversion unit, which takes four times as long.
BITFOLD_HOST_DEVICE inline float small_to_float(unsigned code) {
  return float_from_bits(0x4b000000u | code) - 8388608.0f;
}

// One weight, without outliers: any shape, any address.
BITFOLD_HOST_DEVICE inline float weight_at(const DeviceWeight& w, const Values& values,
                                           const float* map, int64_t row, int64_t col) {
  const PackedView& view = w.view;
  const unsigned code = extract_code(view.codes + row * view.row_bytes, view.cols, view.bits, col);
  const int64_t group = col / view.group_size;
  const float scale = scale_at(view, values, map, row, group);
  switch (view.family) {
    case Family::kInteger:
      return (static_cast<float>(code) - zero_at(view, row, group)) * scale;
    case Family::kFixedCodebook:
      return w.levels[code] * scale;
    case Family::kLearnedCodebook:
      break;
  }
  return learned_level(view, values, row, code) * scale;
}

// As core/view.h's outliers_of and outlier_column: within the buffers, whatever they hold.
BITFOLD_HOST_DEVICE inline OutlierRange outlier_range(const OutlierView& outliers, int64_t row) {
  const auto within = [&](int64_t at, int64_t low) {
    return at < low ? low : at > outliers.count ? outliers.count : at;
  };
  if (outliers.count == 0) return {0, 0};
  const int64_t begin = within(outliers.row[row], 0);
  return {begin, within(outliers.row[row + 1], begin)};
}

BITFOLD_HOST_DEVICE inline int64_t column_of_outlier(const PackedView& view, int64_t i) {
  const void* column = view.outliers.column;
  const int64_t at = view.outliers.wide ? int64_t{static_cast<const int32_t*>(column)[i]}
                                        : int64_t{static_cast<const uint16_t*>(column)[i]};
  return at >= 0 && at < view.cols ? at : -1;
}

// ---- a unit: N = 4 or 8 codes of a row that start at a multiple of N. Groups are multiples of 16,
// so all of them share a scale.

// Bytes as they lie, little-endian; 3 bits: the plane of low bits, and the high bits in the lower N
// bits of `high`.
struct UnitCodes {
  uint32_t low, high;
};

template <int kBytes>
BITFOLD_HOST_DEVICE inline uint32_t load_bytes(const uint8_t* p) {
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4);
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 4) return __ldg(reinterpret_cast<const uint32_t*>(p));
  if constexpr (kBytes == 2) return __ldg(reinterpret_cast<const uint16_t*>(p));
  return __ldg(p);
#else
  uint32_t word = 0;
  memcpy(&word, p, kBytes);
  return word;
#endif
}

// The address of the codes that a unit load must be a multiple of; row_bytes must be one too.
template <int kBits, int N>
BITFOLD_HOST_DEVICE constexpr int unit_alignment() {
  return kBits == 3 ? 1 : kBits * N / 8;
}

template <int kBits, int N>
BITFOLD_HOST_DEVICE inline UnitCodes load_unit(const uint8_t* row, int64_t plane_bytes,
                                               int64_t col) {
  static_assert(N == 4 || N == 8);
  if constexpr (kBits == 8 && N == 8) {
#if defined(__CUDA_ARCH__)
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(row + col));
    return {words.x, words.y};
#else
    return {load_bytes<4>(row + col), load_bytes<4>(row + col + 4)};
#endif
  } else if constexpr (kBits == 3) {
    // Byte by byte: a row of 3-bit codes may start anywhere.
    const uint8_t* low = row + col / 4;
    const uint32_t high = load_bytes<1>(row + plane_bytes + col / 8);
    if constexpr (N == 8) return {load_bytes<1>(low) | load_bytes<1>(low + 1) << 8, high};
    return {load_bytes<1>(low), col % 8 ? high & 15u : high >> 4};
  } else {
    return {load_bytes<kBits * N / 8>(row + col * kBits / 8), 0};
  }
}

// Code `j` of a unit, `j` known to the compiler.
template <int kBits, int N>
BITFOLD_HOST_DEVICE inline unsigned unit_code(UnitCodes codes, int j) {
  if constexpr (kBits == 8) return ((j < 4 ? codes.low : codes.high) >> (8 * (j % 4))) & 255u;
  if constexpr (kBits == 4) return (codes.low >> (8 * (j / 2) + (j % 2 ? 0 : 4))) & 15u;
  const unsigned two = (codes.low >> (8 * (j / 4) + 6 - 2 * (j % 4))) & 3u;
  if constexpr (kBits == 2) return two;
  return two | ((codes.high >> (N - 1 - j)) & 1u) << 2;
}

// What a unit needs beside its codes.
struct UnitParameters {
  float scale, zero;  // zero of integer grids only
};

BITFOLD_HOST_DEVICE inline UnitParameters parameters_at(const PackedView& view,
                                                        const Values& values, const float* map,
                                                        int64_t row, int64_t group) {
  return {scale_at(view, values, map, row, group),
          view.family == Family::kInteger ? zero_at(view, row, group) : 0.0f};
}

// kTable: `table` holds the levels by code; else the grid is of integers.
template <int kBits, int N, bool kTable>
BITFOLD_HOST_DEVICE inline void decode_unit(UnitCodes codes, UnitParameters p, const float* table,
                                            float* out) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int j = 0; j < N; ++j) {
    const unsigned code = unit_code<kBits, N>(codes, j);
    out[j] = (kTable ? table[code] : small_to_float(code) - p.zero) * p.scale;
  }
}

}  // namespace bitfold::cuda
