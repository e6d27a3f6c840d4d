#include "support.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::Owned;

constexpr int64_t kSizes[] = {1, 15, 16, 17, 63, 64, 65, 197, 512, 513};

TEST(Decode, EveryFormatAndLengthIsBitExact) {
  const KernelTable& k = active_kernels();
  for (const std::string& text : testing::dense_formats(testing::every_format())) {
    for (int64_t cols : kSizes) {
      Owned w(format_of(text), 2, cols, /*skew=*/1);
      w.fill_randomly(static_cast<unsigned>(cols));
      const std::vector<float> expected = w.decoded();
      std::vector<float> row(static_cast<size_t>(cols) + 1, 77.0f);
      for (int64_t r = 0; r < 2; ++r) {
        k.decode(w.view(), r, 0, cols, row.data());
        EXPECT_EQ(memcmp(row.data(), expected.data() + r * cols, static_cast<size_t>(cols) * 4), 0)
            << text << " " << cols;
        EXPECT_EQ(row.back(), 77.0f) << "wrote past the end";
      }
    }
  }
}

TEST(Decode, StartsAtAnyMultipleOfSixteen) {
  const KernelTable& k = active_kernels();
  const int64_t cols = 213;
  for (const std::string& text : testing::dense_formats(testing::every_format())) {
    Owned w(format_of(text), 2, cols);
    w.fill_randomly(5);
    const std::vector<float> expected = w.decoded();
    std::vector<float> piece(static_cast<size_t>(cols));
    for (int64_t col = 0; col < cols; col += 16) {
      for (int64_t n : {int64_t{1}, int64_t{31}, int64_t{96}, cols - col}) {
        if (col + n > cols) continue;
        k.decode(w.view(), 1, col, n, piece.data());
        EXPECT_EQ(memcmp(piece.data(), expected.data() + cols + col, static_cast<size_t>(n) * 4), 0)
            << text << " " << col;
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
