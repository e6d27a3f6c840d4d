#include "core/codebook.h"

#include "support.h"

namespace bitfold {
namespace {

// Nearest level in double; a midpoint belongs to the lower level.
unsigned nearest(const Codebook& book, float x) {
  unsigned best = 0;
  for (unsigned code = 1; code < static_cast<unsigned>(book.count); ++code) {
    const double here = std::fabs(double{x} - book.levels[code]),
                 there = std::fabs(double{x} - book.levels[best]);
    if (here < there || (here == there && book.levels[code] < book.levels[best])) best = code;
  }
  return best;
}

struct Named {
  const char* name;
  const Codebook* book;
  int levels;
};
const Named kBooks[] = {{"nf4", &kNf4, 16},
                        {"nf3", &kNf3, 8},
                        {"nf2", &kNf2, 4},
                        {"fp4", &kFp4, 16},
                        {"log4", &kLog4, 16}};

TEST(Codebook, IsWellFormed) {
  for (const Named& n : kBooks) {
    const Codebook& book = *n.book;
    EXPECT_EQ(book.count, n.levels) << n.name;
    for (int i = 0; i + 1 <= book.pivot_count; ++i) {
      EXPECT_LT(book.levels[book.code_of_rank[i]], book.pivots[i]) << n.name;
      EXPECT_GT(book.levels[book.code_of_rank[i + 1]], book.pivots[i]) << n.name;
    }
    EXPECT_EQ(book.levels[book.code_of_rank[0]], -1.0f);
    EXPECT_EQ(book.levels[book.code_of_rank[book.pivot_count]], 1.0f);
  }
  EXPECT_EQ(kFp4.pivot_count, 14) << "two zeros, one of them never written";
}

TEST(Codebook, EncodesToTheNearestLevel) {
  for (const Named& n : kBooks) {
    std::vector<float> xs = testing::random_weights(5000, 6, testing::Shape::kUniform, 1.1f);
    xs.insert(xs.end(), {0.0f, -0.0f, 1.0f, -1.0f, 1e-30f, 5.0f, -5.0f});
    for (int i = 0; i < n.book->count; ++i) xs.push_back(n.book->levels[i]);
    std::vector<uint8_t> codes(xs.size());
    reference::encode_codebook(xs.data(), static_cast<int64_t>(xs.size()), 1.0f, *n.book,
                               codes.data());
    for (size_t i = 0; i < xs.size(); ++i) {
      const float chosen = n.book->levels[codes[i]], best = n.book->levels[nearest(*n.book, xs[i])];
      EXPECT_LE(std::fabs(double{xs[i]} - chosen), std::fabs(double{xs[i]} - best) + 1e-7)
          << n.name << " " << xs[i];
      EXPECT_FALSE(n.book == &kFp4 && codes[i] == 8);
    }
  }
}

TEST(Codebook, MidpointsTakeTheLowerLevel) {
  for (const Named& n : kBooks) {
    for (int p = 0; p < n.book->pivot_count; ++p) {
      const float pivot = n.book->pivots[p];
      const float around[3] = {std::nextafter(pivot, -2.0f), pivot, std::nextafter(pivot, 2.0f)};
      uint8_t codes[3];
      reference::encode_codebook(around, 3, 1.0f, *n.book, codes);
      EXPECT_EQ(codes[0], n.book->code_of_rank[p]);
      EXPECT_EQ(codes[1], n.book->code_of_rank[p]);
      EXPECT_EQ(codes[2], n.book->code_of_rank[p + 1]);
    }
  }
}

TEST(Codebook, LogLevelsAreHalfOctaves) {
  for (int code = 0; code < 16; ++code) {
    const double expected = code < 7    ? -std::exp2(-code / 2.0)
                            : code == 7 ? 0.0
                                        : std::exp2((code - 15) / 2.0);
    EXPECT_NEAR(kLog4.levels[code], expected, 1e-7);
  }
}

TEST(Codebook, RepeatedLevelsCollapse) {
  const float levels[4] = {-1.0f, 0.5f, 0.5f, 0.5f};
  const Codebook book = sorted_codebook(levels, 4);
  EXPECT_EQ(book.count, 4);
  EXPECT_EQ(book.pivot_count, 1);
  const float xs[3] = {-2.0f, -0.25f, 7.0f};
  uint8_t codes[3];
  reference::encode_codebook(xs, 3, 1.0f, book, codes);
  EXPECT_EQ(codes[0], 0);
  EXPECT_EQ(codes[1], 0);
  EXPECT_EQ(codes[2], 1);
}

TEST(Codebook, HugeLevelsAreStillSeparated) {
  const float levels[4] = {-3.2e38f, -2e38f, 2e38f, 3.2e38f};
  const Codebook book = sorted_codebook(levels, 4);
  uint8_t codes[4];
  reference::encode_codebook(levels, 4, 1.0f, book, codes);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(codes[i], i);
}

}  // namespace
}  // namespace bitfold
