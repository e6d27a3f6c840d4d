// The order of activations, and what is asked of their integers. That the order is the one in which
// codecs expand codes is shown by products with unit vectors (unit_vectors_test).
#include "cpu/activations.h"

#include "products.h"

namespace bitfold {
namespace {

using testing::format_of;
using testing::Owned;

constexpr Operand kOperands[] = {Operand::kWords, Operand::kTwoBytes, Operand::kBytes};
constexpr Walk kWalks[] = {Walk::kRows, Walk::kPanels};

// Formats of 2, 3, 4 and 8 bits.
constexpr const char* kFormats[] = {"int2-row", "nf3", "int4-row", "int8-row"};
constexpr int64_t kBlockOfRows[] = {256, 256, 128, 64};  // columns in one vector of stored codes

TEST(ActivationLayout, IsAPermutationOfItsBlock) {
  for (size_t f = 0; f < 4; ++f) {
    Owned w(format_of(kFormats[f]), 1, 1000);
    for (Operand operand : kOperands) {
      for (Walk walk : kWalks) {
        const ActivationLayout& layout = *describe_activations(w.view(), operand, walk, 1).layout;
        ASSERT_EQ(layout.operand, operand);
        ASSERT_EQ(layout.block_cols, walk == Walk::kRows ? kBlockOfRows[f] : 64);
        EXPECT_EQ(layout.block_bytes, layout.block_cols * (operand == Operand::kBytes ? 1 : 2));
        const std::set<int> seen(layout.order, layout.order + layout.block_cols);
        EXPECT_EQ(static_cast<int64_t>(seen.size()), layout.block_cols) << kFormats[f];
        EXPECT_EQ(*seen.begin(), 0);
        EXPECT_EQ(*seen.rbegin(), layout.block_cols - 1);
      }
    }
  }
}

TEST(ActivationUnit, NeverCrossesAGroup) {
  for (const std::string& text : testing::every_format()) {
    for (int64_t cols : {1, 16, 47, 64, 65, 1000}) {
      Owned w(format_of(text), 2, cols);
      const PackedView view = w.view();
      const int64_t unit = describe_activations(view, Operand::kWords, Walk::kRows, 1).unit;
      EXPECT_TRUE(unit == 16 || unit == 32 || unit == 64) << text;
      EXPECT_TRUE(view.groups == 1 || view.group_size % unit == 0) << text << " " << cols;
      for (Operand operand : kOperands) {
        for (Walk walk : kWalks) {
          const Activations x = describe_activations(view, operand, walk, 3);
          EXPECT_EQ(x.layout->operand, operand);
          EXPECT_EQ(x.rows, 3);
          EXPECT_EQ(x.unit, unit);
          EXPECT_EQ(x.units % 16, 0);
          EXPECT_GE(x.blocks * x.layout->block_cols, cols);
          EXPECT_LT((x.blocks - 1) * x.layout->block_cols, cols);
          EXPECT_GE(x.units * unit, x.blocks * x.layout->block_cols);
        }
      }
    }
  }
}

// The largest sum of products in a lane, by hand: every |q| at its limit, rounded up.
TEST(ActivationLimits, LanesCannotOverflow) {
  constexpr int64_t kMost = INT32_MAX;
  for (const std::string& text : testing::some_formats()) {
    Owned w(format_of(text), 1, 64);
    const PackedView view = w.view();
    const bool codebook = view.family != Family::kInteger;
    for (Operand operand : kOperands) {
      const Activations x = describe_activations(view, operand, Walk::kPanels, 1);
      const auto limit = static_cast<int64_t>(x.limit);
      if (operand == Operand::kWords && codebook) {
        EXPECT_LE((static_cast<int64_t>(x.sum_limit) + x.unit / 2) * kLevelLimit, kMost) << text;
        EXPECT_LE(limit, INT16_MAX);
      } else if (operand == Operand::kWords) {
        EXPECT_LE(x.unit * limit * (1 << (view.bits - 1)), kMost) << text;
      } else if (operand == Operand::kTwoBytes) {
        // High bytes, shifted up, and low ones; 16 columns at most in a lane.
        EXPECT_LE(16 * 255 * (127 * 256 + 128), kMost) << text;
        EXPECT_EQ(limit, 127 * 256 + 127);
      } else {
        EXPECT_EQ(limit, 127);
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
