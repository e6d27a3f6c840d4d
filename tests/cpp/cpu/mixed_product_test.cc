// LLM.int8(): exactly the paper's formula, whichever kernels add the integers.
#include "cpu/mixed_product.h"

#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::Owned;
using testing::random_weights;
using testing::Values;

// Columns of `x` [m, cols] with any magnitude above the threshold.
std::vector<int64_t> outlier_columns(const std::vector<float>& x, int64_t m, int64_t cols,
                                     float threshold) {
  std::vector<int64_t> columns;
  for (int64_t c = 0; c < cols; ++c) {
    bool above = false;
    for (int64_t i = 0; i < m; ++i)
      above |= std::fabs(x[static_cast<size_t>(i * cols + c)]) > threshold;
    if (above) columns.push_back(c);
  }
  return columns;
}

struct Expected {
  double value, size;  // size: sum of the magnitudes of what is added in floats
};

// One output by the paper's formula, in double; only x to integers is as the kernel does it.
Expected formula(const PackedView& w, const float* x, int64_t r,
                 const std::vector<int64_t>& columns, double bias) {
  std::vector<bool> is_outlier(static_cast<size_t>(w.cols));
  for (int64_t c : columns) is_outlier[static_cast<size_t>(c)] = true;
  float largest = 0.0f;
  for (int64_t c = 0; c < w.cols; ++c)
    if (!is_outlier[static_cast<size_t>(c)]) largest = std::max(largest, std::fabs(x[c]));
  Expected e{bias, std::fabs(bias)};
  int64_t integers = 0;
  const double scale = scale_of(w, r, 0);
  for (int64_t c = 0; c < w.cols; ++c) {
    const int64_t code = int64_t{w.codes[r * w.row_bytes + c]} - 128;
    if (is_outlier[static_cast<size_t>(c)]) {
      const double product = double{x[c]} * static_cast<double>(code) * scale;
      e.value += product;
      e.size += std::fabs(product);
    } else if (largest > 0.0f) {
      integers += code * static_cast<int64_t>(std::nearbyint(x[c] * (127.0f / largest)));
    }
  }
  const double rest = static_cast<double>(integers) * scale * largest / 127.0;
  e.value += rest;
  e.size += std::fabs(rest);
  return e;
}

void check(const std::string& text, int64_t m, int64_t n, int64_t cols, FloatType dtype,
           const Parallel& parallel, float share_of_outliers, bool fixed) {
  Owned w(format_of(text), n, cols, /*skew=*/1);
  w.fill_randomly(static_cast<unsigned>(cols + n));
  std::vector<float> values = random_weights(m * cols, 2);
  std::mt19937 rng(3);
  for (float& v : values)
    if (static_cast<float>(rng() % 10000) < 10000.0f * share_of_outliers) v *= 20.0f;
  const Values x(dtype, values), bias(dtype, random_weights(n, 3));
  std::vector<int64_t> columns = outlier_columns(x.floats, m, cols, 6.0f);
  if (fixed) columns = {0, cols - 1}, columns.resize(cols > 1 ? 2 : 1);
  std::vector<float> y(static_cast<size_t>(m * n));
  std::vector<uint16_t> y16(y.size());
  const bool wide = dtype == FloatType::kFloat32;
  multiply_mixed(active_kernels(), w.view(), x.data(), m, bias.data(), dtype,
                 {6.0f, fixed, columns.data(), static_cast<int64_t>(columns.size())},
                 wide ? static_cast<void*>(y.data()) : y16.data(), parallel);
  for (size_t i = 0; !wide && i < y.size(); ++i) y[i] = testing::from_bits16(y16[i], dtype);
  const double roundings = 10.0 + static_cast<double>(columns.size());
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < n; ++r) {
      const Expected e = formula(w.view(), x.floats.data() + i * cols, r, columns,
                                 bias.floats[static_cast<size_t>(r)]);
      const double lost = roundings * testing::kRound * e.size;
      const double allowed = lost + 1.01 * testing::store_error(dtype, std::fabs(e.value) + lost);
      ASSERT_NEAR(y[static_cast<size_t>(i * n + r)], e.value, allowed)
          << text << " " << m << "x" << n << "x" << cols << " y[" << i << ", " << r << "], "
          << columns.size() << " outlier columns";
    }
  }
}

TEST(MixedProduct, IsTheFormula) {
  for (int64_t cols : {1, 63, 64, 65, 200, 700}) {
    for (int64_t m : {1, 2, 3, 4, 5, 17}) {
      for (int64_t n : {1, 5, 70}) {
        for (bool fixed : {false, true}) {
          check("int8-row", m, n, cols, FloatType::kFloat32, run_serially, 0.01f, fixed);
          check("int8-tensor", m, n, cols, FloatType::kFloat32, testing::run_in_threads, 0.0f,
                fixed);
        }
      }
    }
  }
}

TEST(MixedProduct, OtherTypesAndManyOutliers) {
  for (FloatType dtype : testing::kDtypes) {
    check("int8-row-dq", 9, 130, 1100, dtype, testing::run_in_threads, 0.0005f, false);
    check("int8-row", 4, 33, 300, dtype, run_serially, 1.0f, false);  // hardly anything else
  }
}

TEST(MixedProduct, RowsBeyondWhatThirtyTwoBitsSum) {
  // Codes 255 and activations that are all equal: the largest sum there is.
  const int64_t cols = 200000;
  Owned w(format_of("int8-row"), 2, cols);
  w.fill_randomly(1);
  memset(w.buffer(BufferRole::kCodes), 0xff, static_cast<size_t>(2 * cols));
  const std::vector<float> x(static_cast<size_t>(3 * cols), 1.0f);
  for (int64_t m : {1, 3}) {
    std::vector<float> y(static_cast<size_t>(2 * m));
    multiply_mixed(active_kernels(), w.view(), x.data(), m, nullptr, FloatType::kFloat32,
                   {6.0f, false, nullptr, 0}, y.data(), run_serially);
    for (size_t i = 0; i < y.size(); ++i) {
      const double expected = 127.0 * static_cast<double>(cols) * scale_of(w.view(), i % 2, 0);
      EXPECT_NEAR(y[i], expected, 8 * testing::kRound * expected);
    }
  }
}

TEST(MixedProduct, NotFinite) {
  const KernelTable& k = active_kernels();
  Owned w(format_of("int8-row"), 3, 70);
  w.fill_randomly(1);
  std::vector<float> x = random_weights(2 * 70, 1), y(6);
  x[75] = NAN;
  const int64_t fixed[] = {1};
  for (bool known : {false, true}) {  // in an outlier column, and not
    multiply_mixed(k, w.view(), x.data(), 2, nullptr, FloatType::kFloat32, {6.0f, known, fixed, 1},
                   y.data(), run_serially);
    for (int i = 0; i < 6; ++i) EXPECT_EQ(std::isnan(y[static_cast<size_t>(i)]), i >= 3);
  }
  std::fill(x.begin(), x.end(), 0.0f);
  multiply_mixed(k, w.view(), x.data(), 2, nullptr, FloatType::kFloat32, {6.0f, false, nullptr, 0},
                 y.data(), run_serially);
  EXPECT_EQ(y, std::vector<float>(6, 0.0f));
}

TEST(MixedProduct, FormatsThatSuit) {
  for (const char* text : {"int8", "int8-row-dq", "int8-tensor"})
    EXPECT_TRUE(suits_mixed_product(format_of(text))) << text;
  for (const char* text :
       {"int8-g64", "int8-zp", "int8-midrise", "int8-outliers", "int4-row", "nf4"})
    EXPECT_FALSE(suits_mixed_product(format_of(text))) << text;
}

}  // namespace
}  // namespace bitfold
