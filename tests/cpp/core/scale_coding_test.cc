#include "core/scale_coding.h"

#include "core/codebook.h"
#include "support.h"

namespace bitfold {
namespace {

int exponent_of(const std::vector<float>& values) {
  MagnitudeRange range, rest;
  const auto n = static_cast<int64_t>(values.size());
  range.add(values.data(), n / 2);
  rest.add(values.data() + n / 2, n - n / 2);
  range.add(rest);
  return choose_exponent(range);
}

TEST(Exponent, IsZeroWhereHalvesSuffice) {
  for (const std::vector<float>& values : std::vector<std::vector<float>>{
           {}, {0.0f}, {1.0f, 0.0f}, {6.103515625e-5f, 65504.0f}, {-3.0f, 0.001f}}) {
    EXPECT_EQ(exponent_of(values), 0);
  }
}

TEST(Exponent, KeepsTinyAndHugeScalesPrecise) {
  for (float top : {1e-38f, 1e-30f, 1e-12f, 6.1e-5f, 65536.0f, 1e20f, 3.4e38f}) {
    const std::vector<float> values = {top, top * 0.71f, top * 0.01f, -top * 0.3f, 0.0f};
    const auto n = static_cast<int64_t>(values.size());
    const int exponent = exponent_of(values);
    EXPECT_GE(exponent, -126);
    EXPECT_LE(exponent, 127);
    std::vector<uint16_t> halves(values.size());
    encode_halves(values.data(), n, exponent, halves.data());
    for (size_t i = 0; i < values.size(); ++i) {
      const double back = std::ldexp(static_cast<double>(half_to_float(halves[i])), exponent);
      EXPECT_LE(std::fabs(back - values[i]), std::fabs(values[i]) * 0x1p-11 + 1e-45)
          << top << " " << i;
    }
  }
}

// Nearest on a grid of 65536 points over [-1, 1]: up to half a grid step from the scale, to either
// side of a boundary.
TEST(DoubleQuantization, NearestEntryOfTheMap) {
  std::mt19937 rng(5);
  std::uniform_real_distribution<float> uniform(0.001f, 0.2f);
  for (int64_t n : {1, 2, 255, 256, 257, 1000}) {
    std::vector<float> scales(static_cast<size_t>(n));
    for (float& s : scales) s = uniform(rng);
    const int64_t blocks = (n + 255) / 256;
    std::vector<uint8_t> codes(scales.size());
    std::vector<float> absmax(static_cast<size_t>(blocks)), back(scales.size());
    float offset = 0;
    double_quantize(scales.data(), n, codes.data(), absmax.data(), &offset);
    double_dequantize(codes.data(), absmax.data(), offset, n, back.data());
    double mean = 0.0;
    for (float s : scales) mean += s;
    EXPECT_EQ(offset, static_cast<float>(mean / static_cast<double>(n)));
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(i);
      const float block = absmax[static_cast<size_t>(i / 256)];
      double best = INFINITY;
      for (float level : kDynamicMap)
        best = std::min(best, std::fabs(double{level} * block + offset - double{scales[at]}));
      EXPECT_LE(std::fabs(double{back[at]} - scales[at]),
                best * (1 + 1e-5) + block * 2.0 / 65535 + 1e-8);
    }
  }
}

TEST(DoubleQuantization, DifferencesThatOverflowDoNotCrash) {
  const std::vector<float> scales = {3e38f, -3e38f, -3e38f};
  std::vector<uint8_t> codes(3);
  float absmax = 0, offset = 0;
  double_quantize(scales.data(), 3, codes.data(), &absmax, &offset);
  EXPECT_TRUE(std::isinf(absmax));
}

TEST(DoubleQuantization, EqualScalesAreExact) {
  const std::vector<float> scales(300, 0.37f);
  std::vector<uint8_t> codes(300);
  std::vector<float> absmax(2), back(300);
  float offset = 0;
  double_quantize(scales.data(), 300, codes.data(), absmax.data(), &offset);
  double_dequantize(codes.data(), absmax.data(), offset, 300, back.data());
  EXPECT_EQ(back, scales);
}

TEST(DoubleQuantization, DynamicMapFollowsItsFormula) {
  std::vector<double> expected = {0.0, 1.0};
  for (int i = 0; i < 7; ++i) {
    const int points = (1 << i) + 1;
    for (int j = 0; j + 1 < points; ++j) {
      const double a = 0.1 + 0.9 * j / (points - 1), b = 0.1 + 0.9 * (j + 1) / (points - 1);
      for (double sign : {1.0, -1.0})
        expected.push_back(sign * std::pow(10.0, i - 6) * (a + b) / 2);
    }
  }
  std::sort(expected.begin(), expected.end());
  ASSERT_EQ(expected.size(), 256u);
  for (size_t i = 0; i < 256; ++i) {
    EXPECT_NEAR(kDynamicMap[i], expected[i], std::fabs(expected[i]) * 3e-7 + 1e-14) << i;
    if (i > 0) {
      EXPECT_LT(kDynamicMap[i - 1], kDynamicMap[i]);
    }
  }
  EXPECT_EQ(kDynamicMap[127], 0.0f);
  EXPECT_EQ(kDynamicMap[255], 1.0f);
}

}  // namespace
}  // namespace bitfold
