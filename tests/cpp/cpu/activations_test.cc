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
constexpr int kPerLane[] = {16, 16, 8, 4};  // columns in 32 bits of stored codes

TEST(ActivationLayout, OrdersTheColumnsOfEachLane) {
  for (size_t f = 0; f < 4; ++f) {
    Owned w(format_of(kFormats[f]), 1, 1000);
    for (Operand operand : kOperands) {
      for (Walk walk : kWalks) {
        const ActivationLayout& layout = *describe_activations(w.view(), operand, walk, 1).layout;
        ASSERT_EQ(layout.operand, operand);
        ASSERT_EQ(layout.block_cols, walk == Walk::kRows ? 64 * kPerLane[f] : 64);
        EXPECT_LE(layout.block_cols, kMaxBlockCols);
        EXPECT_EQ(layout.block_bytes, layout.block_cols * (operand == Operand::kBytes ? 1 : 2));
        const std::set<int> seen(layout.order, layout.order + 64);
        EXPECT_EQ(seen.size(), 64u) << kFormats[f];
        for (int i = 0; i < 64; ++i) EXPECT_EQ(layout.order[i] / kPerLane[f], i / kPerLane[f]);
      }
    }
  }
}

// Turned or not, a lane of the walk over rows meets columns of one unit alone, and every column of
// the block has its lane.
TEST(ActivationLayout, LanesOfRowsHoldOneUnit) {
  for (const char* text : {"int2-g16-zp", "int2-g32-zp", "nf3-g64", "int4-g16", "nf4-g32", "nf4",
                           "int8-g16", "int8-g32", "int8-row"}) {
    Owned w(format_of(text), 1, 2048);
    for (Operand operand : kOperands) {
      const Activations x = describe_activations(w.view(), operand, Walk::kRows, 1);
      const int cols = static_cast<int>(x.layout->block_cols) / 16;  // of a lane, side by side
      std::set<int> first;
      for (int begin : x.layout->first_col_of_lane) {
        EXPECT_EQ(begin / x.unit, (begin + cols - 1) / x.unit) << text;
        EXPECT_EQ(begin % cols, 0) << text;
        first.insert(begin);
      }
      EXPECT_EQ(first.size(), 16u) << text;
      EXPECT_LE(x.layout->block_cols / x.unit, 16) << text;
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
          EXPECT_EQ(x.span, unit);
          EXPECT_EQ(x.units % 16, 0);
          EXPECT_GE(x.blocks * x.layout->block_cols, cols);
          EXPECT_LT((x.blocks - 1) * x.layout->block_cols, cols);
          EXPECT_GE(x.units * unit, x.blocks * x.layout->block_cols);
        }
      }
    }
  }
}

// A wide span is whole units, and whole slabs.
TEST(ActivationSpan, HoldsWholeUnits) {
  for (const std::string& text : testing::every_format()) {
    Owned w(format_of(text), 2, 1000);
    const Activations x =
        describe_activations(w.view(), Operand::kWords, Walk::kPanels, 3, /*across_groups=*/true);
    EXPECT_EQ(x.span % x.unit, 0) << text;
    EXPECT_EQ(x.span % 64, 0) << text;
    EXPECT_EQ(16 % (x.span / x.unit), 0) << text << ": sixteen units are quantized at a time";
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
      const auto keeps_within = [&](const Activations& a) {
        EXPECT_LE((static_cast<int64_t>(a.sum_limit) + a.span / 2) * kLevelLimit, kMost) << text;
        EXPECT_LE(limit, INT16_MAX);
      };
      if (operand == Operand::kWords)
        keeps_within(describe_activations(view, operand, Walk::kPanels, 1, true));
      if (operand == Operand::kWords && codebook) {
        keeps_within(x);
      } else if (operand == Operand::kWords) {
        EXPECT_LE(x.unit * limit * (1 << (view.bits - 1)), kMost) << text;
      } else if (operand == Operand::kTwoBytes) {
        // High bytes, shifted up, and low ones; a lane holds columns of one unit.
        EXPECT_LE(64 * 255 * (127 * 256 + 128), kMost) << text;
        EXPECT_EQ(limit, 127 * 256 + 127);
      } else {
        EXPECT_EQ(limit, 127);
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
