// Bits of half and bfloat16 to float and back, rounding to nearest even; plain integer arithmetic,
// usable on host and device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define BITFOLD_HOST_DEVICE __host__ __device__
#else
#define BITFOLD_HOST_DEVICE
#endif

namespace bitfold {

BITFOLD_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

BITFOLD_HOST_DEVICE inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

BITFOLD_HOST_DEVICE inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into place the exponent is 112 too small; one multiplication by 2^112 mends normals and
  // subnormals alike.
  const float value = float_from_bits(magnitude << 13) * float_from_bits((127u + 112u) << 23);
  return float_from_bits(sign | bits_from_float(value));
}

BITFOLD_HOST_DEVICE inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more: infinity
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 places the 10 bits at the end of the significand and lets the FPU
    // round to even.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bits_from_float(shifted) - 0x3f000000u);
  }
  magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);  // exponent - 112, and round half to even
  return sign | static_cast<uint16_t>(magnitude >> 13);
}

BITFOLD_HOST_DEVICE inline float bfloat16_to_float(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

BITFOLD_HOST_DEVICE inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace bitfold
