// What CUDA kernels fold with, run here weight by weight against the vector kernels and the scalar
// reference.
#include "cuda/encode.h"

#include <algorithm>
#include <cmath>

#include "core/bitpack.h"
#include "cuda/search.h"
#include "solvers/scale_storage.h"
#include "support.h"

namespace bitfold::cuda {
namespace {

using bitfold::testing::active_kernels;
using bitfold::testing::format_of;
using bitfold::testing::Owned;

const char* const kBooks[] = {"nf4", "nf3", "nf2", "fp4", "log4"};

unsigned code_of(const DeviceEncoding& e, float scaled) {
  return code_in(e.bins[bin_of(scaled)], scaled);
}

TEST(CudaEncode, BinsDecideAsPivotsDo) {
  for (const char* name : kBooks) {
    const Format format = format_of(name);
    const Codebook& book = *format.element().codebook;
    const DeviceEncoding e = make_encoding(format);
    std::vector<float> x = {0.0f, -0.0f, INFINITY, -INFINITY, 1e-30f, -1e-30f, 7.0f, -7.0f};
    for (int i = -20000; i <= 20000; ++i) x.push_back(static_cast<float>(i) / 16384);
    // Around pivots, and around edges of bins, where the sum is rounded up to the next.
    std::vector<float> near(book.pivots, book.pivots + book.pivot_count);
    for (int b = -1; b <= kBins; ++b)
      near.push_back((static_cast<float>(b) - 0.5f / kBinStride - kBinOfZero) / kBinsPerOne);
    for (float at : near) {
      float up = at, down = at;
      for (int i = 0; i < 2000; ++i) {
        x.push_back(up = std::nextafter(up, 9.0f));
        x.push_back(down = std::nextafter(down, -9.0f));
      }
      x.push_back(at);
    }
    std::vector<uint8_t> expected(x.size());
    reference::encode_codebook(x.data(), static_cast<int64_t>(x.size()), 1.0f, book,
                               expected.data());
    for (size_t i = 0; i < x.size(); ++i)
      ASSERT_EQ(code_of(e, x[i]), expected[i]) << name << " " << x[i];
  }
}

TEST(CudaEncode, PlacesOfBinsStayInTheTable) {
  for (int i = -16384; i <= 16384; ++i) {
    const float x = static_cast<float>(i) / 16384;
    const double sum = double{x} * kBinsPerOne + kBinOfZero;  // exact, as is what follows
    const double bin = std::floor(std::nearbyint(sum * kBinStride) / kBinStride);
    ASSERT_EQ(bin_of(x), static_cast<uint32_t>(bin)) << x;
    ASSERT_EQ(bin_place(x), bin_of(x) * kBinStride) << x;
  }
  const float beyond = 1.0f + 4e-7f;  // 1 / absmax is rounded
  EXPECT_EQ(bin_place(beyond), bin_of(1.0f) * kBinStride);
  EXPECT_EQ(bin_place(-beyond), bin_of(-1.0f) * kBinStride);
  for (float x : {NAN, INFINITY, -INFINITY, 3e38f, -3e38f}) {
    EXPECT_LT(bin_place(x), kBins * kBinStride) << x;
    EXPECT_LT(bin_of(x), kBins) << x;
  }
}

TEST(CudaEncode, ScalesOfRangesAreThoseOfTheVectorKernels) {
  const KernelTable& k = active_kernels();
  std::vector<float> low, high, shrink_low, shrink_high;
  const float ends[] = {0.0f,    -0.0f, 1.0f,   -1.0f,    0.3f,     -2.7f,   1e-40f,
                        -1e-40f, 3e38f, -3e38f, 1.00001f, -1.0e-5f, 65504.0f};
  for (float a : ends) {
    for (float b : ends) {
      if (a > b) continue;
      for (float shrink : {1.0f, 0.85f, 0.4f}) {
        low.push_back(a);
        high.push_back(b);
        shrink_low.push_back(1.0f);
        shrink_high.push_back(shrink);
      }
    }
  }
  const auto n = static_cast<int64_t>(low.size());
  std::vector<float> scale(low.size()), zero(low.size());
  for (const char* name : {"nf4", "int8-row", "int8-row-zp", "int8-row-fz", "int4", "int4-g64-fz",
                           "int4-g64-sym", "int3", "int3-g64-midrise", "int2", "int2-g64-fz"}) {
    const Format format = format_of(name);
    const DeviceEncoding e = make_encoding(format);
    k.choices(encoding_of(format), n, low.data(), high.data(), shrink_low.data(),
              shrink_high.data(), scale.data(), zero.data());
    for (size_t i = 0; i < low.size(); ++i) {
      const ScaleAndZero chosen =
          choose_scale(e.bits, e.zero, e.book, low[i], high[i], shrink_low[i], shrink_high[i]);
      ASSERT_EQ(bits_from_float(chosen.scale), bits_from_float(scale[i]))
          << name << " " << low[i] << " " << high[i];
      ASSERT_EQ(bits_from_float(chosen.zero), bits_from_float(zero[i]))
          << name << " " << low[i] << " " << high[i];
    }
  }
}

TEST(CudaEncode, InverseIsThatOfTheCore) {
  for (float scale : {0.0f, -0.0f, 1e-39f, -1e-39f, 1e-38f, 0.3f, -0.3f, 3e38f})
    EXPECT_EQ(inverse_scale(scale), inverse_of(scale)) << scale;
}

TEST(CudaEncode, ExponentsAreThoseOfTheCore) {
  const float values[] = {0.0f, 1e-45f, 3e-42f, 1e-38f, 1.2e-38f, 6e-5f, 6.103515625e-5f,
                          1.0f, 65504,  65505,  1e10f,  3e38f};
  for (float a : values) {
    for (float b : values) {
      MagnitudeRange range;
      const float both[] = {a, b};
      range.add(both, 2);
      EXPECT_EQ(exponent_of_range(range.largest, range.smallest), choose_exponent(range))
          << a << " " << b;
    }
  }
}

TEST(CudaEncode, DynamicCodesOfEveryPoint) {
  const DynamicSteps steps = make_dynamic_steps();
  // Blocks of 256 whose largest is 1 and mean 0: every value is its own quotient.
  std::vector<float> scales(256);
  std::vector<uint8_t> codes(256);
  float absmax, offset;
  for (int first = 0; first < 65536; first += 127) {
    for (int i = 0; i < 127; ++i) {
      const float x = static_cast<float>(std::min(first + i, 65535)) * (2.0f / 65535) - 1.0f;
      scales[static_cast<size_t>(2 * i)] = x;
      scales[static_cast<size_t>(2 * i + 1)] = -x;
    }
    scales[254] = 1.0f;
    scales[255] = -1.0f;
    bitfold::double_quantize(scales.data(), 256, codes.data(), &absmax, &offset);
    ASSERT_EQ(offset, 0.0f);
    for (size_t i = 0; i < 256; ++i) {
      ASSERT_EQ(code_of_point(steps.step, point_of(scales[i] * inverse_of_block(absmax))), codes[i])
          << scales[i];
    }
  }
}

TEST(CudaEncode, SumsThatAreExactAreTheSameInAnyOrder) {
  EXPECT_TRUE(sums_exactly(0.0f, INFINITY, 100));
  EXPECT_TRUE(sums_exactly(1.0f, 0.5f, 1 << 18));
  EXPECT_FALSE(sums_exactly(1.0f, 1e-8f, 1 << 18));
  std::mt19937 rng(1);
  for (float least : {0.9f, 0.01f, 1e-3f}) {
    std::uniform_real_distribution<float> draw(least, 1.0f);
    std::vector<float> values(4096);
    for (float& v : values) v = draw(rng);
    ASSERT_TRUE(sums_exactly(1.0f, least, 4096)) << least;
    double forward = 0.0, backward = 0.0;
    for (float v : values) forward += v;
    std::reverse(values.begin(), values.end());
    for (float v : values) backward += v;
    EXPECT_EQ(forward, backward);
  }
}

template <int kBits>
void expect_packed_as_rows() {
  std::mt19937 rng(kBits);
  for (int64_t cols : {1, 3, 7, 8, 9, 16, 37, 64}) {
    std::vector<uint8_t> codes(static_cast<size_t>(cols));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(rng() & ((1 << kBits) - 1));
    const auto bytes = static_cast<size_t>(packed_row_bytes(cols, kBits));
    std::vector<uint8_t> expected(bytes), row(bytes + 1, 0xee);
    pack_row(codes.data(), cols, kBits, expected.data());
    for (int64_t col = 0; col < cols; col += 8) {
      unsigned code[8] = {};
      const int n = static_cast<int>(std::min<int64_t>(8, cols - col));
      for (int j = 0; j < n; ++j) code[j] = codes[static_cast<size_t>(col + j)];
      store_unit<kBits>(row.data(), (cols + 3) / 4, col, n, pack_unit<kBits>(code));
    }
    EXPECT_EQ(row[bytes], 0xee);
    row.pop_back();
    EXPECT_EQ(row, expected) << kBits << " bits, " << cols;
  }
}

TEST(CudaEncode, UnitsArePackedAsRowsAre) {
  expect_packed_as_rows<8>();
  expect_packed_as_rows<4>();
  expect_packed_as_rows<3>();
  expect_packed_as_rows<2>();
}

// ---- the whole way of a group, as search_spans walks it: sixteen lanes, sums met in their order
// ----

struct LaneSums {
  float part[16] = {};
  void add(int64_t j, float v) { part[j % 16] += v; }
  float met() {
    for (int step = 8; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) part[i] += part[i + step];
    return part[0];
  }
};

struct HostProbe {
  const DeviceEncoding& e;
  const float* w;
  int64_t n;

  float unit(float v, float inverse, float zero) const {
    if (e.book) return e.levels[code_of(e, v * inverse)];
    return grid_code(v, inverse, zero, static_cast<float>((1 << e.bits) - 1)) - zero;
  }
  float error(ScaleAndZero choice) const {
    const float inverse = 1.0f / greater(choice.scale, 1e-38f);
    LaneSums sum;
    for (int64_t j = 0; j < n; ++j) {
      const float off = w[j] - unit(w[j], inverse, choice.zero) * choice.scale;
      sum.add(j, off * off);
    }
    return is_possible(choice) ? sum.met() : INFINITY;
  }
  FitSums fit(ScaleAndZero choice) const {
    const float inverse = inverse_scale(choice.scale);
    LaneSums error, wd, dd, sum_w, sum_d;
    for (int64_t j = 0; j < n; ++j) {
      const float d = unit(w[j], inverse, choice.zero), off = w[j] - d * choice.scale;
      error.add(j, off * off);
      wd.add(j, w[j] * d);
      dd.add(j, d * d);
      sum_w.add(j, w[j]);
      sum_d.add(j, d);
    }
    return {error.met(), wd.met(), dd.met(), sum_w.met(), sum_d.met()};
  }
};

TEST(CudaSearch, FindsTheScalesOfTheCpu) {
  const KernelTable& k = active_kernels();
  const int64_t rows = 3, cols = 150;
  for (const char* name :
       {"nf4-nodq", "fp4-nodq", "nf3-nodq", "nf2-g48-nodq", "int8-row", "int8-g64-zp", "int4-g64",
        "int4-g64-sym", "int4-g64-fz", "int3-g64", "int3-row-fz", "int2-g64", "int2-g16-zp"}) {
    const Format format = format_of(name);
    const DeviceEncoding e = make_encoding(format);
    const bool asymmetric = format.zero == Zero::kInt || format.zero == Zero::kFloat;
    const Shrinks shrinks = shrinks_for(format.bits(), asymmetric);
    for (auto shape : {bitfold::testing::Shape::kGaussian, bitfold::testing::Shape::kOutliers}) {
      std::vector<float> w = bitfold::testing::random_weights(rows * cols, 5, shape);
      std::fill_n(w.begin(), 64, 0.0f);  // a group of nothing
      Owned cpu(format, rows, cols);
      ASSERT_TRUE(cpu.quantize(k, Method::kSearch, w).ok());
      const PackedView view = cpu.view();
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t g = 0; g < view.groups; ++g) {
          const int64_t first = g * view.group_size, n = std::min(view.group_size, cols - first);
          const float* span = w.data() + r * cols + first;
          const auto [low, high] = std::minmax_element(span, span + n);
          const ScaleAndZero found =
              search_scale(e, shrinks, HostProbe{e, span, n}, *low, *high, static_cast<double>(n));
          // As it is stored: fp32 as it is, else through fp16 (no power of two at this size).
          const float stored = e.book ? found.scale : half_to_float(float_to_half(found.scale));
          ASSERT_EQ(stored, scale_of(view, r, g)) << name << " row " << r << " group " << g;
          const float zero =
              e.zero == Zero::kFloat ? half_to_float(float_to_half(found.zero)) : found.zero;
          if (e.book) continue;
          ASSERT_EQ(zero, zero_of(view, r, g)) << name << " row " << r;
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitfold::cuda
