#include "support.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::random_weights;

constexpr int64_t kSizes[] = {1, 2, 15, 16, 17, 63, 64, 65, 197};

TEST(EncodeGrid, EqualsTheReference) {
  const KernelTable& k = active_kernels();
  for (int64_t n : kSizes) {
    std::vector<float> w =
        random_weights(n + 1, static_cast<unsigned>(n), testing::Shape::kOutliers);
    w[0] = 0.125f;  // with the steps below: exactly half way between codes
    for (float scale : {0.25f, 0.1f, 0.013f, 3.0f, 1e-30f, 0.0f, 1e30f}) {
      for (float top : {3.0f, 7.0f, 15.0f, 255.0f}) {
        for (float zero : {0.0f, std::floor(top / 2), top / 2, top, -1.375f, 1000.0f}) {
          std::vector<uint8_t> got(static_cast<size_t>(n) + 1, 0xee),
              expected(static_cast<size_t>(n));
          k.encode_grid(w.data(), n, Grid{scale, zero, top}, got.data());
          reference::encode_grid(w.data(), n, inverse_of(scale), zero, top, expected.data());
          EXPECT_EQ(got.back(), 0xee);
          got.pop_back();
          EXPECT_EQ(got, expected)
              << "n " << n << " scale " << scale << " zero " << zero << " top " << top;
        }
      }
    }
  }
}

TEST(EncodeCodebook, EqualsTheReference) {
  const KernelTable& k = active_kernels();
  for (const Codebook* book : {&kNf4, &kNf3, &kNf2, &kFp4, &kLog4}) {
    for (int64_t n : kSizes) {
      std::vector<float> w = random_weights(n, static_cast<unsigned>(n), testing::Shape::kUniform);
      for (int p = 0; p < book->pivot_count && p < n; ++p)
        w[static_cast<size_t>(p)] = book->pivots[p];
      for (float scale : {1.0f, 0.77f, 0.0f, 1e-38f, 1e30f}) {
        std::vector<uint8_t> got(static_cast<size_t>(n) + 1, 0xee),
            expected(static_cast<size_t>(n));
        k.encode_codebook(w.data(), n, scale, *book, got.data());
        reference::encode_codebook(w.data(), n, inverse_of(scale), *book, expected.data());
        EXPECT_EQ(got.back(), 0xee);
        got.pop_back();
        EXPECT_EQ(got, expected) << book->count << " levels, n " << n << ", scale " << scale;
      }
    }
  }
}

TEST(Stats, ExtremesSumAndFiniteness) {
  const KernelTable& k = active_kernels();
  for (int64_t n : kSizes) {
    std::vector<float> w = random_weights(n, static_cast<unsigned>(n));
    const SpanStats stats = k.stats(w.data(), n);
    double sum = 0.0, magnitude = 0.0;
    for (float v : w) sum += v, magnitude += std::fabs(v);
    EXPECT_EQ(stats.min, *std::min_element(w.begin(), w.end()));
    EXPECT_EQ(stats.max, *std::max_element(w.begin(), w.end()));
    EXPECT_NEAR(stats.sum, sum, magnitude * 1e-6);
    EXPECT_TRUE(stats.finite);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      for (int64_t at = 0; at < n; ++at) {
        std::vector<float> broken = w;
        broken[static_cast<size_t>(at)] = bad;
        EXPECT_FALSE(k.stats(broken.data(), n).finite) << bad << " at " << at << " of " << n;
      }
    }
    const std::vector<float> positive(static_cast<size_t>(n), 2.5f),
        huge(static_cast<size_t>(n), 3e38f);
    EXPECT_EQ(k.stats(positive.data(), n).min, 2.5f) << "absent lanes must not count as zeros";
    EXPECT_TRUE(k.stats(huge.data(), n).finite) << "a sum that overflows is not an infinite weight";
  }
}

TEST(Fit, SumsOverExactlyTheSpan) {
  const KernelTable& k = active_kernels();
  for (int64_t n : kSizes) {
    const std::vector<float> w = random_weights(n, static_cast<unsigned>(n));
    const Grid grid{0.5f, 1.5f,
                    3.0f};  // mid-rise: no code decodes to zero, so an absent lane would show
    std::vector<uint8_t> codes(static_cast<size_t>(n));
    reference::encode_grid(w.data(), n, 2.0f, 1.5f, 3.0f, codes.data());
    double error = 0.0, wd = 0.0, dd = 0.0, sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double d = codes[static_cast<size_t>(i)] - 1.5, v = w[static_cast<size_t>(i)];
      error += (v - d * 0.5) * (v - d * 0.5);
      wd += v * d;
      dd += d * d;
      sum += d;
    }
    const SpanFit fit = k.fit_grid(w.data(), n, grid);
    EXPECT_NEAR(k.error_grid(w.data(), n, grid), error, error * 1e-5 + 1e-6);
    EXPECT_NEAR(fit.wd, wd, std::fabs(wd) * 1e-5 + 1e-5);
    EXPECT_NEAR(fit.dd, dd, dd * 1e-6);
    EXPECT_NEAR(fit.d, sum, 1e-4);
  }
}

}  // namespace
}  // namespace bitfold
