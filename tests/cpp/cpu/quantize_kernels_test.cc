#include "core/bitpack.h"
#include "core/shrinks.h"
#include "support.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::random_weights;

constexpr int64_t kSizes[] = {1, 2, 15, 16, 17, 63, 64, 65, 197};

// Codes of a packed row, and a check that no byte after it was touched and padding bits are zero.
std::vector<uint8_t> encoded(const Encoding& encoding, const std::vector<float>& w, int64_t n,
                             int64_t group, const std::vector<float>& scale,
                             const std::vector<float>& zero) {
  const int64_t bytes = packed_row_bytes(n, encoding.bits);
  std::vector<uint8_t> row(static_cast<size_t>(bytes) + 1, 0xee), codes(static_cast<size_t>(n));
  active_kernels().encode(encoding, w.data(), n, group, scale.data(),
                          zero.empty() ? nullptr : zero.data(), row.data());
  EXPECT_EQ(row.back(), 0xee);
  row.pop_back();
  unpack_row(row.data(), n, encoding.bits, codes.data());
  std::vector<uint8_t> again(row.size());
  pack_row(codes.data(), n, encoding.bits, again.data());
  EXPECT_EQ(row, again) << "padding bits";
  return codes;
}

TEST(Encode, GridsEqualTheReference) {
  for (int64_t n : kSizes) {
    std::vector<float> w =
        random_weights(n + 1, static_cast<unsigned>(n), testing::Shape::kOutliers);
    w[0] = 0.125f;  // with the steps below: exactly half way between codes
    for (int bits : {2, 3, 4, 8}) {
      const float top = static_cast<float>((1 << bits) - 1);
      for (float scale : {0.25f, 0.1f, 0.013f, 3.0f, 1e-30f, 0.0f, 1e30f}) {
        for (float zero : {0.0f, std::floor(top / 2), top / 2, top, -1.375f, 1000.0f}) {
          std::vector<uint8_t> expected(static_cast<size_t>(n));
          reference::encode_grid(w.data(), n, inverse_of(scale), zero, top, expected.data());
          EXPECT_EQ(encoded({bits, Zero::kFloat, nullptr}, w, n, n, {scale}, {zero}), expected)
              << "n " << n << " scale " << scale << " zero " << zero << " bits " << bits;
        }
      }
    }
  }
}

TEST(Encode, CodebooksEqualTheReference) {
  const float few[] = {-1.0f, -1.0f, 0.5f, 0.5f};  // repeated levels leave pivots unused
  const Codebook learned = sorted_codebook(few, 4);
  for (const Codebook* book : {&kNf4, &kNf3, &kNf2, &kFp4, &kLog4, &learned}) {
    const int bits = book->count == 16 ? 4 : book->count == 8 ? 3 : 2;
    for (int64_t n : kSizes) {
      std::vector<float> w = random_weights(n, static_cast<unsigned>(n), testing::Shape::kUniform);
      for (int p = 0; p < book->pivot_count && p < n; ++p)
        w[static_cast<size_t>(p)] = book->pivots[p];
      for (float scale : {1.0f, 0.77f, 0.0f, 1e-38f, 1e30f}) {
        std::vector<uint8_t> expected(static_cast<size_t>(n));
        reference::encode_codebook(w.data(), n, inverse_of(scale), *book, expected.data());
        EXPECT_EQ(encoded({bits, Zero::kNone, book}, w, n, n, {scale}, {}), expected)
            << book->count << " levels, n " << n << ", scale " << scale;
      }
    }
  }
}

TEST(Encode, EachGroupHasItsScale) {
  const int64_t group = 48;
  for (int64_t n : {int64_t{197}, 100 * group + 7}) {
    const std::vector<float> w = random_weights(n, 3);
    std::vector<float> scale, zero;
    std::vector<uint8_t> expected(static_cast<size_t>(n));
    for (int64_t at = 0; at < n; at += group) {
      scale.push_back(0.01f * static_cast<float>(1 + at % 31));
      zero.push_back(static_cast<float>(at % 15));
      reference::encode_grid(w.data() + at, std::min(group, n - at), inverse_of(scale.back()),
                             zero.back(), 15.0f, expected.data() + at);
    }
    EXPECT_EQ(encoded({4, Zero::kInt, nullptr}, w, n, group, scale, zero), expected) << n;
  }
}

TEST(Stats, ExtremesAndFiniteness) {
  const KernelTable& k = active_kernels();
  for (int64_t n : kSizes) {
    std::vector<float> w = random_weights(n, static_cast<unsigned>(n));
    for (int64_t group : {int64_t{16}, int64_t{64}, n}) {
      const auto groups = static_cast<size_t>((n + group - 1) / group);
      std::vector<float> low(groups + 1, 77.0f), high(groups + 1, 77.0f);
      EXPECT_TRUE(k.stats(w.data(), n, group, low.data(), high.data()));
      for (size_t g = 0; g < groups; ++g) {
        const auto begin = w.begin() + static_cast<int64_t>(g) * group;
        const auto end = std::min(begin + group, w.end());
        EXPECT_EQ(low[g], *std::min_element(begin, end));
        EXPECT_EQ(high[g], *std::max_element(begin, end));
      }
      EXPECT_EQ(low[groups], 77.0f);
      EXPECT_EQ(high[groups], 77.0f);
    }
    float low, high;
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      for (int64_t at = 0; at < n; ++at) {
        std::vector<float> broken = w;
        broken[static_cast<size_t>(at)] = bad;
        EXPECT_FALSE(k.stats(broken.data(), n, n, &low, &high))
            << bad << " at " << at << " of " << n;
      }
    }
    const std::vector<float> positive(static_cast<size_t>(n), 2.5f),
        huge(static_cast<size_t>(n), 3e38f);
    EXPECT_TRUE(k.stats(positive.data(), n, n, &low, &high));
    EXPECT_EQ(low, 2.5f) << "absent lanes must not count as zeros";
    EXPECT_TRUE(k.stats(huge.data(), n, n, &low, &high)) << "huge is not infinite";
  }
}

// Sixteen random spans and their interleaved block.
struct Spans {
  std::vector<std::vector<float>> w;
  std::vector<float> block;
  explicit Spans(int64_t n) : block(static_cast<size_t>(16 * n + 1), 77.0f) {
    const float* pointers[16];
    for (unsigned lane = 0; lane < 16; ++lane) {
      w.push_back(random_weights(n, static_cast<unsigned>(n) + 1000 * lane));
      pointers[lane] = w.back().data();
    }
    active_kernels().interleave(pointers, n, block.data());
  }
};

TEST(Interleave, PutsEachSpanInItsLane) {
  for (int64_t n : kSizes) {
    const Spans spans(n);
    for (size_t lane = 0; lane < 16; ++lane) {
      for (size_t j = 0; j < static_cast<size_t>(n); ++j)
        ASSERT_EQ(spans.block[16 * j + lane], spans.w[lane][j]);
    }
    EXPECT_EQ(spans.block.back(), 77.0f) << "wrote past the end";
  }
}

TEST(Fit, SumsOverExactlyTheSpan) {
  for (int64_t n : kSizes) {
    const Spans spans(n);
    // Mid-rise: no code decodes to zero, so a weight too many would show.
    const Encoding encoding{2, Zero::kFloat, nullptr};
    const std::vector<float> scale(16, 0.5f), zero(16, 1.5f);
    SpanFits fits;
    active_kernels().fit(encoding, spans.block.data(), n, scale.data(), zero.data(), &fits);
    for (size_t lane = 0; lane < 16; ++lane) {
      std::vector<uint8_t> codes(static_cast<size_t>(n));
      reference::encode_grid(spans.w[lane].data(), n, 2.0f, 1.5f, 3.0f, codes.data());
      double error = 0.0, wd = 0.0, dd = 0.0, sum_w = 0.0, sum_d = 0.0;
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        const double d = codes[i] - 1.5, v = spans.w[lane][i];
        error += (v - d * 0.5) * (v - d * 0.5);
        wd += v * d;
        dd += d * d;
        sum_w += v;
        sum_d += d;
      }
      EXPECT_NEAR(fits.error[lane], error, error * 1e-5 + 1e-6);
      EXPECT_NEAR(fits.wd[lane], wd, std::fabs(wd) * 1e-5 + 1e-5);
      EXPECT_NEAR(fits.dd[lane], dd, dd * 1e-6);
      EXPECT_NEAR(fits.w[lane], sum_w, 1e-4);
      EXPECT_NEAR(fits.d[lane], sum_d, 1e-4);
    }
  }
}

TEST(Errors, AreThoseOfEachChoiceAndLane) {
  const KernelTable& k = active_kernels();
  for (int64_t n : kSizes) {
    const Spans spans(n);
    for (const Encoding& encoding :
         {Encoding{4, Zero::kInt, nullptr}, Encoding{8, Zero::kNone, nullptr},
          Encoding{3, Zero::kNone, &kNf3}}) {
      for (int64_t count : {1, 3, 4, 25}) {
        const auto values = static_cast<size_t>(16 * count);
        std::vector<float> scale(values), zero(values), errors(values + 1, 77.0f);
        for (size_t i = 0; i < values; ++i) {
          scale[i] = 0.003f * static_cast<float>(i + 1);
          zero[i] = static_cast<float>(i % 15);
        }
        k.errors(encoding, spans.block.data(), n, count, scale.data(), zero.data(), errors.data());
        for (size_t at = 0; at < values; at += 16) {
          SpanFits fits;
          k.fit(encoding, spans.block.data(), n, &scale[at], &zero[at], &fits);
          for (size_t lane = 0; lane < 16; ++lane) EXPECT_EQ(errors[at + lane], fits.error[lane]);
        }
        EXPECT_EQ(errors.back(), 77.0f);
      }
    }
  }
}

TEST(Errors, AreInfiniteWhereThereIsNoChoice) {
  const Spans spans(64);
  std::vector<float> scale(16, 0.1f), zero(16, 3.0f), errors(16);
  scale[1] = 0.0f;
  scale[2] = -1.0f;
  scale[3] = INFINITY;
  scale[4] = NAN;
  zero[5] = 2049.0f;
  zero[6] = -2049.0f;
  active_kernels().errors({4, Zero::kFloat, nullptr}, spans.block.data(), 64, 1, scale.data(),
                          zero.data(), errors.data());
  for (size_t i = 0; i < 16; ++i) {
    if (i >= 1 && i <= 6) {
      EXPECT_EQ(errors[i], INFINITY) << i;
    } else {
      EXPECT_LT(errors[i], 1e3f) << i;
    }
  }
}

// Sixteen spans of n weights, interleaved: most of them random, some such as bounds of errors go
// wrong with, or say nothing of.
std::vector<float> difficult_spans(int64_t n, unsigned seed, testing::Shape shape) {
  std::vector<float> block = random_weights(16 * n, seed, shape, 0.02f);
  for (int64_t j = 0; j < n; ++j) {
    float* w = block.data() + 16 * j;
    w[0] = 0.0f;
    w[1] *= 1e-30f;  // whose squares are no floats
    w[2] *= 1e32f;
    w[3] = std::fabs(w[3]);
    w[4] = -1.0f - w[4];
    w[5] = std::round(w[5] * 100.0f);  // many choices are equally good
    w[6] = j == n / 2 ? w[6] : 0.0f;
    w[7] *= 1e-40f;
    w[8] = 0.3f;
    w[9] = j % 2 == 0 ? 0.3f : -0.3f;
  }
  return block;
}

TEST(BestChoice, IsTheFirstOfLeastError) {
  const KernelTable& k = active_kernels();
  for (const Encoding& encoding :
       {Encoding{8, Zero::kNone, nullptr}, Encoding{4, Zero::kNone, nullptr},
        Encoding{4, Zero::kInt, nullptr}, Encoding{4, Zero::kFloat, nullptr},
        Encoding{3, Zero::kNone, nullptr}, Encoding{3, Zero::kInt, nullptr},
        Encoding{3, Zero::kMidrise, nullptr}, Encoding{2, Zero::kInt, nullptr},
        Encoding{2, Zero::kMidrise, nullptr}, Encoding{2, Zero::kNone, nullptr},
        Encoding{4, Zero::kNone, &kNf4}}) {
    const bool asymmetric = encoding.zero == Zero::kInt || encoding.zero == Zero::kFloat;
    const Shrinks shrinks = shrinks_for(encoding.bits, asymmetric);
    for (int64_t n : {1, 2, 15, 16, 18, 64, 128, 300, 1026}) {
      for (auto shape : {testing::Shape::kGaussian, testing::Shape::kLaplace,
                         testing::Shape::kUniform, testing::Shape::kOutliers}) {
        const std::vector<float> block = difficult_spans(n, static_cast<unsigned>(n), shape);
        float low[16], high[16];
        for (int64_t lane = 0; lane < 16; ++lane) {
          low[lane] = high[lane] = block[static_cast<size_t>(lane)];
          for (int64_t j = 1; j < n; ++j) {
            low[lane] = std::min(low[lane], block[static_cast<size_t>(16 * j + lane)]);
            high[lane] = std::max(high[lane], block[static_cast<size_t>(16 * j + lane)]);
          }
        }
        float scale[kMaxChoices][16], zero[kMaxChoices][16], errors[kMaxChoices][16];
        for (int c = 0; c < shrinks.count; ++c) {
          float shrink_low[16], shrink_high[16];
          std::fill_n(shrink_low, 16, shrinks.low[c]);
          std::fill_n(shrink_high, 16, shrinks.high[c]);
          k.choices(encoding, 16, low, high, shrink_low, shrink_high, scale[c], zero[c]);
        }
        k.errors(encoding, block.data(), n, shrinks.count, scale[0], zero[0], errors[0]);
        std::vector<int16_t> scratch(static_cast<size_t>(32 * (n / 2)));
        float best_scale[16], best_zero[16], least[16];
        k.best_choice(encoding, block.data(), n, low, high, shrinks.count, scale[0], zero[0],
                      scratch.data(), best_scale, best_zero, least);
        for (int lane = 0; lane < 16; ++lane) {
          int best = 0;
          for (int c = 1; c < shrinks.count; ++c)
            best = errors[c][lane] < errors[best][lane] ? c : best;
          const auto where = [&] {
            return "bits " + std::to_string(encoding.bits) + " zero " +
                   std::to_string(int(encoding.zero)) + " n " + std::to_string(n) + " lane " +
                   std::to_string(lane);
          };
          EXPECT_EQ(best_scale[lane], scale[best][lane]) << where();
          EXPECT_EQ(best_zero[lane], zero[best][lane]) << where();
          EXPECT_EQ(least[lane], errors[best][lane]) << where();
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
