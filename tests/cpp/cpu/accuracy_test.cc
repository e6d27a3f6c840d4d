// What each level promises: the error of a product relative to its own size, root mean square,
// against double on the decoded weights. Weights as training leaves them, activations as layers
// make them: a few channels far larger than the rest.
#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::Values;

constexpr int64_t kRows = 64, kBatch = 8, kManyRows = 64;

std::vector<float> activations(int64_t m, int64_t cols) {
  std::vector<float> x = testing::random_weights(m * cols, 11);
  for (size_t i = 0; i < x.size(); ++i) {
    if (static_cast<int64_t>(i) % cols % 131 == 7) x[i] *= 20.0f;
  }
  return x;
}

double relative_error(const std::vector<float>& y, const std::vector<double>& exact) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < y.size(); ++i) {
    error += (y[i] - exact[i]) * (y[i] - exact[i]);
    size += exact[i] * exact[i];
  }
  return std::sqrt(error / size);
}

double promised(Accuracy level, FloatType dtype) {
  if (level == Accuracy::kInt8) return 2.5e-2;
  if (dtype != FloatType::kFloat32) return 2e-3;
  return level == Accuracy::kAuto ? 2e-4 : 2e-6;
}

// All outputs, from one row of activations at a time and from all of `batch` at once.
void check(const std::string& text, int64_t cols, const std::vector<FloatType>& dtypes,
           const std::vector<float>& weights, int64_t batch = kBatch,
           const std::vector<Accuracy>& levels = {Accuracy::kAuto, Accuracy::kFp32,
                                                  Accuracy::kInt8}) {
  const KernelTable& k = active_kernels();
  testing::Owned w(testing::format_of(text), kRows, cols);
  ASSERT_TRUE(w.quantize(k, Method::kRound, weights).ok());
  const std::vector<float> weight = w.decoded(), rows = activations(batch, cols);
  for (FloatType dtype : dtypes) {
    const Values all(dtype, rows);
    std::vector<double> exact(static_cast<size_t>(batch * kRows));
    for (size_t at = 0; at < exact.size(); ++at) {
      const float* a = all.floats.data() + at / kRows * static_cast<size_t>(cols);
      const float* b = weight.data() + at % kRows * static_cast<size_t>(cols);
      for (int64_t c = 0; c < cols; ++c) exact[at] += double{a[c]} * b[c];
    }
    for (Accuracy level : levels) {
      for (int64_t m : {int64_t{1}, batch}) {
        std::vector<float> y;
        for (int64_t i = 0; i < batch; i += m) {
          const Values x(dtype, {rows.begin() + i * cols, rows.begin() + (i + m) * cols});
          const std::vector<float> part = multiply(k, w.view(), x, m, nullptr, level);
          y.insert(y.end(), part.begin(), part.end());
        }
        EXPECT_LE(relative_error(y, exact), promised(level, dtype))
            << text << " " << testing::name_of(level) << " m " << m << " dtype " << int(dtype);
      }
    }
  }
}

std::vector<float> gaussian(int64_t cols) {
  return testing::random_weights(kRows * cols, 12, testing::Shape::kGaussian, 0.02f);
}

TEST(Accuracy, EveryFormatInFloat32) {
  for (const std::string& text : testing::every_format())
    check(text, 1024, {FloatType::kFloat32}, gaussian(1024));
}

// k-means spends a level on an outlier; the others must not share its step.
TEST(Accuracy, LearnedLevelsFarApart) {
  std::vector<float> one = gaussian(1024), each = one;
  one[5] = 4.0f;
  for (size_t r = 0; r < kRows; ++r) each[r * 1024 + 9] = r % 2 ? 2.0f : -4.0f;
  const std::vector<float> tails =
      testing::random_weights(kRows * 1024, 3, testing::Shape::kOutliers, 0.02f);
  for (const char* text : {"kmeans4-row", "kmeans4-tensor", "kmeans3-row", "kmeans2-row"}) {
    for (const auto& weights : {one, each, tails})
      check(text, 1024, {FloatType::kFloat32}, weights);
  }
}

// Rows of which many are summed across groups; weights too with some that are far larger.
TEST(Accuracy, ManyRows) {
  std::vector<float> far = gaussian(1100);
  for (size_t r = 0; r < kRows; ++r) far[r * 1100 + 7 * r] *= 20.0f;
  for (const std::string& text : testing::some_formats()) {
    for (const auto& weights : {gaussian(1100), far})
      check(text, 1100, {FloatType::kBFloat16}, weights, kManyRows, {Accuracy::kAuto});
  }
}

// Weights and activations that make up for each other, as methods that smooth activations leave
// them: group after group has weights so many times smaller and activations as many times larger.
TEST(Accuracy, ManyRowsOfUnevenGroups) {
  const KernelTable& k = active_kernels();
  const int64_t cols = 1024;
  for (float ratio : {1.0f, 4.0f, 7.0f, 10.0f, 30.0f, 1000.0f}) {
    std::vector<float> weights = gaussian(cols);
    std::vector<float> x = testing::random_weights(kManyRows * cols, 13);
    const auto small = [&](size_t i) { return i % cols / 64 % 2 == 1; };
    for (size_t i = 0; i < weights.size(); ++i) weights[i] /= small(i) ? ratio : 1.0f;
    for (size_t i = 0; i < x.size(); ++i) x[i] *= small(i) ? ratio : 1.0f;
    const Values rows(FloatType::kBFloat16, x);
    for (const char* text : {"nf4", "int4-g64", "int8-g64-zp", "int2-g64", "int3-g32", "nf3-g16"}) {
      testing::Owned w(testing::format_of(text), kRows, cols);
      ASSERT_TRUE(w.quantize(k, Method::kRound, weights).ok());
      const std::vector<float> weight = w.decoded();
      std::vector<double> exact(static_cast<size_t>(kManyRows * kRows));
      reference::linear(w.view(), rows.floats.data(), kManyRows, nullptr, exact.data());
      const auto y = multiply(k, w.view(), rows, kManyRows, nullptr, Accuracy::kAuto);
      EXPECT_LE(relative_error(y, exact), 2e-3) << text << " ratio " << ratio;
    }
  }
}

TEST(Accuracy, HalvesAndRaggedRows) {
  for (const std::string& text : testing::some_formats())
    check(text, 1100, {FloatType::kFloat16, FloatType::kBFloat16}, gaussian(1100));
}

}  // namespace
}  // namespace bitfold
