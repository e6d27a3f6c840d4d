#include "core/float16.h"

#include "support.h"

namespace bitfold {
namespace {

// From the definition: sign, five bits of exponent with bias 15, ten bits of significand.
double value_of_half(uint16_t half) {
  const int exponent = (half >> 10) & 31, significand = half & 1023;
  const double magnitude =
      exponent ? std::ldexp(1024 + significand, exponent - 25) : std::ldexp(significand, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

TEST(Half, EveryPatternWidensExactly) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = half_to_float(half);
    if ((half & 0x7c00) == 0x7c00) {
      EXPECT_EQ(std::isnan(value), (half & 0x3ff) != 0);
      EXPECT_EQ(std::isinf(value), (half & 0x3ff) == 0);
      EXPECT_EQ(std::signbit(value), (half & 0x8000) != 0);
      continue;
    }
    EXPECT_EQ(static_cast<double>(value), value_of_half(half));
    EXPECT_EQ(std::signbit(value), (half & 0x8000) != 0);
    EXPECT_EQ(float_to_half(value), half);
  }
}

// Nearest half by search among all of them in double; ties to the even pattern.
uint16_t nearest_half(float value) {
  if (std::isnan(value)) return 0x7e00;
  const double magnitude = std::fabs(static_cast<double>(value));
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  unsigned low = 0, high = 0x7bff;  // magnitudes ascend with their patterns
  while (low < high) {
    const unsigned middle = (low + high + 1) / 2;
    if (value_of_half(static_cast<uint16_t>(middle)) <= magnitude)
      low = middle;
    else
      high = middle - 1;
  }
  const double below = magnitude - value_of_half(static_cast<uint16_t>(low));
  const double next = low == 0x7bff ? 65536.0 : value_of_half(static_cast<uint16_t>(low + 1));
  const double above = next - magnitude;
  if (above < below || (above == below && low % 2 == 1)) ++low;
  return sign | static_cast<uint16_t>(low);
}

TEST(Half, RoundsToNearestEven) {
  std::mt19937 rng(3);
  for (unsigned i = 0; i < 0x7bff;
       ++i) {  // every midpoint between neighbours, and a float to either side
    const auto low = static_cast<uint16_t>(i);
    const auto middle =
        static_cast<float>((value_of_half(low) + value_of_half(static_cast<uint16_t>(i + 1))) / 2);
    for (float v : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)}) {
      EXPECT_EQ(float_to_half(v), nearest_half(v)) << v;
      EXPECT_EQ(float_to_half(-v), nearest_half(-v)) << v;
    }
  }
  for (int i = 0; i < 200000; ++i) {
    const float v = float_from_bits(static_cast<uint32_t>(rng()));
    if (!std::isnan(v)) {
      EXPECT_EQ(float_to_half(v), nearest_half(v)) << v;
    }
  }
  for (float v : {0.0f, -0.0f, 65504.0f, 65519.996f, 65520.0f, 1e38f, INFINITY, 1e-45f,
                  2.9802322e-8f, 2.9802326e-8f}) {
    EXPECT_EQ(float_to_half(v), nearest_half(v)) << v;
  }
  EXPECT_TRUE(std::isnan(half_to_float(float_to_half(NAN))));
}

TEST(BFloat16, RoundsToNearestEven) {
  std::mt19937 rng(4);
  for (int i = 0; i < 200000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(rng());
    const float v = float_from_bits(bits);
    const uint16_t got = float_to_bfloat16(v);
    if (std::isnan(v)) {
      EXPECT_TRUE(std::isnan(bfloat16_to_float(got)));
      continue;
    }
    const uint32_t low = bits >> 16, rest = bits & 0xffff;
    const uint32_t expected = low + (rest > 0x8000 || (rest == 0x8000 && low % 2 == 1));
    EXPECT_EQ(got, expected);
  }
  EXPECT_EQ(float_to_bfloat16(3.4e38f), 0x7f80) << "rounds to infinity";
  EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(float_from_bits(0x7f800001u)))))
      << "a NaN with low bits only";
}

}  // namespace
}  // namespace bitfold
