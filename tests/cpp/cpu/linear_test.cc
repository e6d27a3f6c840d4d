#include "cpu/linear.h"

#include "support.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::kRound;
using testing::Owned;
using testing::random_weights;

struct Case {
  int64_t m, n, k;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int64_t m : {0, 1, 2, 7, 16, 33}) {
    for (int64_t k : {1, 15, 16, 17, 63, 64, 65, 197, 512, 513}) all.push_back({m, 13, k});
  }
  for (int64_t n : {1, 63, 64, 65, 131})
    all.push_back({5, n, 530}), all.push_back({1, n, 1100}), all.push_back({17, n, 33});
  return all;
}

// Summands of a lane over K, sixteen lanes, one rounding per tile of 512 columns, bias; then one
// store in y's type.
double sum_bound(int64_t k, double magnitude) {
  return (static_cast<double>(k) / 16.0 + static_cast<double>(k) / 512.0 + 22.0) * kRound *
         magnitude;
}

void check(const KernelTable& k, const std::string& text, const Case& c, FloatType dtype,
           const Parallel& parallel) {
  Owned w(format_of(text), c.n, c.k, /*skew=*/1);
  w.fill_randomly(static_cast<unsigned>(c.k + c.n));
  const std::vector<float> weight = w.decoded();
  std::vector<float> x = random_weights(c.m * c.k, 2), bias = random_weights(c.n, 3);
  const bool wide = dtype == FloatType::kFloat32;
  const std::vector<uint16_t> x16 = testing::to_bits16(x, dtype),
                              bias16 = testing::to_bits16(bias, dtype);
  if (!wide) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = testing::from_bits16(x16[i], dtype);
    for (size_t i = 0; i < bias.size(); ++i) bias[i] = testing::from_bits16(bias16[i], dtype);
  }
  std::vector<float> y(static_cast<size_t>(c.m * c.n) + 1, 99.0f);
  std::vector<uint16_t> y16(y.size(), 99);
  linear(k, w.view(), wide ? static_cast<const void*>(x.data()) : x16.data(), c.m,
         wide ? static_cast<const void*>(bias.data()) : bias16.data(), dtype,
         wide ? static_cast<void*>(y.data()) : y16.data(), parallel);
  EXPECT_TRUE(wide ? y.back() == 99.0f : y16.back() == 99) << "wrote past the end";
  std::vector<double> expected(static_cast<size_t>(c.m * c.n));
  reference::linear(w.view(), x.data(), c.m, bias.data(), expected.data());
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t r = 0; r < c.n; ++r) {
      const auto at = static_cast<size_t>(i * c.n + r);
      double magnitude = std::fabs(bias[static_cast<size_t>(r)]);
      for (int64_t p = 0; p < c.k; ++p) {
        magnitude += std::fabs(double{x[static_cast<size_t>(i * c.k + p)]} *
                               weight[static_cast<size_t>(r * c.k + p)]);
      }
      const double got = wide ? y[at] : testing::from_bits16(y16[at], dtype);
      const double allowed = sum_bound(c.k, magnitude) * 1.01 +
                             (wide ? 0.0 : testing::store_error(dtype, expected[at]) * 1.01);
      EXPECT_LE(std::fabs(got - expected[at]), allowed)
          << text << " y[" << i << ", " << r << "] of " << c.m << "x" << c.n << "x" << c.k;
    }
  }
}

TEST(Linear, EveryShapeAgainstTheReference) {
  const KernelTable& k = active_kernels();
  for (const char* text : {"nf4", "int4-g64", "int3-g16", "int2-g128", "int8-row", "kmeans4-row"}) {
    for (const Case& c : cases()) check(k, text, c, FloatType::kFloat32, run_serially);
  }
}

TEST(Linear, EveryFormatAndDtype) {
  const KernelTable& k = active_kernels();
  for (const std::string& text : testing::every_format()) {
    for (FloatType dtype : {FloatType::kFloat32, FloatType::kFloat16, FloatType::kBFloat16}) {
      check(k, text, {3, 9, 197}, dtype, run_serially);
    }
  }
}

TEST(Linear, ThreadsAndHugeBatches) {
  const KernelTable& k = active_kernels();
  check(k, "nf4", {2, 200, 65}, FloatType::kFloat32, testing::run_in_threads);
  check(k, "int4-g64", {40, 200, 65}, FloatType::kBFloat16, testing::run_in_threads);
  check(k, "int4-g64", {1030, 5, 17}, FloatType::kFloat16,
        testing::run_in_threads);  // more than one batch of activations
}

TEST(Linear, NoBias) {
  const KernelTable& k = active_kernels();
  Owned w(format_of("nf4"), 3, 20);
  w.fill_randomly(1);
  const std::vector<float> x = random_weights(20, 2);
  std::vector<float> y(3);
  std::vector<double> expected(3);
  linear(k, w.view(), x.data(), 1, nullptr, FloatType::kFloat32, y.data(), run_serially);
  reference::linear(w.view(), x.data(), 1, nullptr, expected.data());
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(y[i], expected[i], 1e-4);
}

TEST(Linear, NonFiniteActivationsStayInTheirRow) {
  const KernelTable& k = active_kernels();
  Owned w(format_of("int4-g64"), 5, 70);
  w.fill_randomly(1);
  std::vector<float> x = random_weights(3 * 70, 2), y(15);
  x[70 + 69] = NAN;
  linear(k, w.view(), x.data(), 3, nullptr, FloatType::kFloat32, y.data(), run_serially);
  for (size_t i = 0; i < 15; ++i) EXPECT_EQ(std::isnan(y[i]), i / 5 == 1) << i;
}

TEST(GradInput, AgainstTheReference) {
  const KernelTable& k = active_kernels();
  for (const std::string& text : testing::some_formats()) {
    for (const Case& c : std::vector<Case>{
             {0, 3, 5}, {1, 13, 197}, {7, 65, 130}, {33, 7, 17}, {2, 3, 2100}, {1030, 2, 3}}) {
      Owned w(format_of(text), c.n, c.k);
      w.fill_randomly(4);
      const std::vector<float> weight = w.decoded(), g = random_weights(c.m * c.n, 5);
      std::vector<float> gx(static_cast<size_t>(c.m * c.k) + 1, 99.0f);
      linear_grad_input(k, w.view(), g.data(), c.m, FloatType::kFloat32, gx.data(),
                        testing::run_in_threads);
      EXPECT_EQ(gx.back(), 99.0f);
      for (int64_t i = 0; i < c.m; ++i) {
        for (int64_t p = 0; p < c.k; ++p) {
          double sum = 0.0, magnitude = 0.0;
          for (int64_t r = 0; r < c.n; ++r) {
            const double product = double{g[static_cast<size_t>(i * c.n + r)]} *
                                   weight[static_cast<size_t>(r * c.k + p)];
            sum += product;
            magnitude += std::fabs(product);
          }
          EXPECT_LE(std::fabs(gx[static_cast<size_t>(i * c.k + p)] - sum),
                    (static_cast<double>(c.n) + 20.0) * kRound * magnitude)
              << text << " " << c.m << "x" << c.n << "x" << c.k;
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
