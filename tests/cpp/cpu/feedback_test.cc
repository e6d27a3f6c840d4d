// One block of rounding with error feedback against the loop that it stands for, and the searches
// weighted by importance.
#include "support.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::random_weights;

struct Panel {
  int64_t cols, groups, stride;
  std::vector<float> weights, scale, zero, correction, error, change, books, cost;
  std::vector<uint8_t> exact, codes;

  Panel(int64_t count, int64_t group_count, unsigned seed)
      : cols(count + 3),
        groups(group_count),
        stride(19),
        weights(random_weights(16 * cols, seed)),
        scale(static_cast<size_t>(16 * groups)),
        zero(scale.size()),
        correction(random_weights(stride * count, seed + 1, testing::Shape::kGaussian, 0.1f)),
        error(random_weights(stride * count, seed + 2, testing::Shape::kGaussian, 0.1f)),
        change(error.size(), 77.0f),
        cost(16, 1.0f),
        exact(weights.size()),
        codes(weights.size(), 1) {
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = 0.1f + 0.01f * static_cast<float>(i % 7);
      zero[i] = static_cast<float>(i % 4);
    }
    for (size_t i = 0; i < exact.size(); i += 11) exact[i] = 1;
  }
};

struct Block {
  int64_t count;
  std::vector<float> matrix, factor, cost;
  std::vector<int32_t> column, group;

  Block(int64_t n, int64_t groups, unsigned seed)
      : count(n),
        matrix(random_weights(n * n, seed, testing::Shape::kGaussian, 0.2f)),
        factor(random_weights(n, seed + 1)),
        cost(random_weights(n, seed + 2)) {
    for (int64_t k = 0; k < n; ++k) {
      column.push_back(static_cast<int32_t>(n - 1 - k + 2));
      group.push_back(static_cast<int32_t>(k % groups));
      cost[static_cast<size_t>(k)] = std::fabs(cost[static_cast<size_t>(k)]);
    }
  }
  FeedbackColumns view(bool feedback) const {
    return {count,         feedback ? matrix.data() : nullptr,
            factor.data(), cost.data(),
            column.data(), group.data()};
  }
};

// The code of v and the decode of a code, in the arithmetic of the kernels.
struct Levels {
  Encoding encoding;
  const std::vector<Codebook>* books;  // by lane

  void round(float v, float scale, float zero, size_t lane, int* code, float* decoded) const {
    if (books || encoding.book) {
      const Codebook& book = books ? (*books)[lane] : *encoding.book;
      const float scaled = books ? v : v * inverse_of(scale);
      int rank = 0;
      while (rank < book.pivot_count && scaled > book.pivots[rank]) ++rank;
      *code = book.code_of_rank[rank];
      *decoded = book.levels[*code] * scale;
      return;
    }
    const float top = static_cast<float>((1 << encoding.bits) - 1);
    const float level = std::clamp(std::nearbyint(v * inverse_of(scale) + zero), 0.0f, top);
    *code = static_cast<int>(level);
    *decoded = (level - zero) * scale;
  }
};

void expected(const Levels& levels, const Block& block, Panel* p, bool feedback, bool again,
              bool corrected, bool with_exact) {
  for (size_t lane = 0; lane < 16; ++lane) {
    std::vector<float> c(static_cast<size_t>(block.count));
    for (int64_t k = 0; k < block.count; ++k) {
      const auto at = static_cast<size_t>(k * p->stride) + lane;
      float& sum = c[static_cast<size_t>(k)];
      if (corrected) sum = p->correction[at] * block.factor[static_cast<size_t>(k)];
      if (again) sum -= p->error[at];
    }
    for (int64_t k = 0; k < block.count; ++k) {
      const auto i = static_cast<size_t>(k);
      const auto at = static_cast<size_t>(k * p->stride) + lane;
      const auto place = static_cast<size_t>(block.column[i]) * 16 + lane;
      const auto group = static_cast<size_t>(block.group[i]) * 16 + lane;
      const float w = p->weights[place];
      int code;
      float decoded;
      levels.round(w + c[i], p->scale[group], p->zero[group], lane, &code, &decoded);
      float error = w - decoded;
      if (with_exact && p->exact[place]) error = 0.0f;
      float off = c[i] + error, change = error;
      float square = off * off;
      if (again) {
        const float old = p->error[at], before = c[i] + old;
        if (!(std::fabs(before) > std::fabs(off))) {
          error = old;
          code = p->codes[place];
          off = before;
        }
        square = off * off - before * before;
        change = error - old;
        p->change[at] = change;
      }
      p->error[at] = error;
      p->codes[place] = static_cast<uint8_t>(code);
      p->cost[lane] += block.cost[i] * square;
      if (!feedback) continue;
      for (int64_t j = k + 1; j < block.count; ++j)
        c[static_cast<size_t>(j)] +=
            change * block.matrix[static_cast<size_t>(k * block.count + j)];
    }
  }
}

TEST(Feedback, EqualsTheLoopBitForBit) {
  const float few[] = {-1.0f, 0.25f, 0.25f, 0.75f};
  for (int64_t count : {int64_t{1}, int64_t{2}, int64_t{37}, kFeedbackColumns}) {
    std::vector<Encoding> encodings;
    for (int bits : {2, 3, 4, 8}) encodings.push_back({bits, Zero::kInt, nullptr});
    encodings.push_back({4, Zero::kNone, &kNf4});
    encodings.push_back({4, Zero::kNone, &kFp4});
    encodings.push_back({2, Zero::kNone, &kNf2});
    encodings.push_back({2, Zero::kNone, nullptr});  // learned, below
    for (size_t e = 0; e < encodings.size(); ++e) {
      const bool learned = e + 1 == encodings.size();
      std::vector<Codebook> lanes;
      Panel base(count, 3, 7);
      if (learned) {
        base.books.resize(768);
        for (size_t lane = 0; lane < 16; ++lane) {
          float levels[4];
          for (int i = 0; i < 4; ++i) levels[i] = few[i] * (1.0f + 0.1f * static_cast<float>(lane));
          lanes.push_back(sorted_codebook(levels, 4));
          for (int rank = 0; rank < 16; ++rank) {
            const Codebook& book = lanes.back();
            const auto at = static_cast<size_t>(16 * rank) + lane;
            const int code = book.code_of_rank[std::min(rank, book.pivot_count)];
            base.books[at] = rank < book.pivot_count ? book.pivots[rank] : INFINITY;
            base.books[256 + at] = book.levels[code];
            base.books[512 + at] = static_cast<float>(code);
          }
        }
      }
      const Block block(count, base.groups, 9);
      for (int option = 0; option < 16; ++option) {
        const bool feedback = option & 1, again = option & 2, corrected = option & 4,
                   with_exact = option & 8;
        Panel got = base, want = base;
        expected({encodings[e], learned ? &lanes : nullptr}, block, &want, feedback, again,
                 corrected, with_exact);
        active_kernels().feed_back(
            encodings[e], block.view(feedback),
            {got.weights.data(), got.scale.data(), got.zero.data(),
             with_exact ? got.exact.data() : nullptr, learned ? got.books.data() : nullptr,
             got.stride, corrected ? got.correction.data() : nullptr, got.error.data(),
             again ? got.change.data() : nullptr, got.codes.data(), got.cost.data()});
        EXPECT_EQ(got.error, want.error) << count << " encoding " << e << " option " << option;
        EXPECT_EQ(got.codes, want.codes) << count << " encoding " << e << " option " << option;
        EXPECT_EQ(got.change, want.change) << count << " encoding " << e << " option " << option;
        EXPECT_EQ(got.cost, want.cost) << count << " encoding " << e << " option " << option;
      }
    }
  }
}

TEST(WeightedSearch, OnesAndZerosWeighAsOnesAndZeros) {
  for (int64_t n : {int64_t{16}, int64_t{64}, int64_t{197}}) {
    const std::vector<float> block = random_weights(16 * n, 3);
    const std::vector<float> scale(16, 0.3f), zero(16, 1.5f);
    for (const Encoding& encoding :
         {Encoding{2, Zero::kFloat, nullptr}, Encoding{4, Zero::kNone, &kNf4}}) {
      std::vector<float> ones(block.size(), 1.0f), plain(16), weighted(16);
      SpanFits a, b;
      active_kernels().errors(encoding, block.data(), n, 1, scale.data(), zero.data(),
                              plain.data());
      active_kernels().weighted_errors(encoding, block.data(), ones.data(), n, 1, scale.data(),
                                       zero.data(), weighted.data());
      EXPECT_EQ(plain, weighted);
      active_kernels().fit(encoding, block.data(), n, scale.data(), zero.data(), &a);
      active_kernels().weighted_fit(encoding, block.data(), ones.data(), n, scale.data(),
                                    zero.data(), &b);
      for (size_t i = 0; i < 16; ++i) {
        EXPECT_EQ(a.error[i], b.error[i]);
        EXPECT_EQ(a.wd[i], b.wd[i]);
        EXPECT_EQ(a.dd[i], b.dd[i]);
      }
      // The second half weighs nothing, the first one double.
      std::vector<float> half(block.size());
      std::fill_n(half.begin(), 16 * (n / 2), 2.0f);
      active_kernels().errors(encoding, block.data(), n / 2, 1, scale.data(), zero.data(),
                              plain.data());
      active_kernels().weighted_errors(encoding, block.data(), half.data(), n, 1, scale.data(),
                                       zero.data(), weighted.data());
      for (size_t i = 0; i < 16; ++i) EXPECT_NEAR(weighted[i], 2 * plain[i], 1e-5 * plain[i]);
    }
  }
}

}  // namespace
}  // namespace bitfold
