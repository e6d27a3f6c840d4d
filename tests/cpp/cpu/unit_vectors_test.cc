// Products with unit vectors are the weights themselves: every column of a block meets its own
// code, for every operand and both walks.
#include <algorithm>

#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::Owned;

constexpr int64_t kRows = 43,
                  kCols = 1024 + 77;  // a whole block of every format, and a ragged one

struct alignas(64) Line {
  uint8_t bytes[64];
};
std::vector<Line> lines(int64_t bytes) {
  return std::vector<Line>(static_cast<size_t>(bytes / 64 + 1));
}

// y [m, kRows] for x [m, kCols], by the kernels alone.
std::vector<float> product(const PackedView& w, Operand operand, Walk walk, const float* x,
                           int64_t m, bool across_groups = false) {
  const KernelTable& k = active_kernels();
  Activations xs = describe_activations(w, operand, walk, m, across_groups);
  std::vector<Line> data = lines(xs.blocks * m * xs.layout->block_bytes);
  std::vector<float> scale(static_cast<size_t>(m * xs.units)), sum(scale.size());
  std::vector<uint8_t> shared(static_cast<size_t>(xs.units));
  xs.data = data.data()->bytes;
  xs.scale = scale.data();
  xs.sum = sum.data();
  if (across_groups) {
    xs.shared = shared.data();
    k.mark_shared_spans(w, xs);
  }
  for (int64_t i = 0; i < m; ++i)
    EXPECT_TRUE(k.quantize_activations(x + i * w.cols, FloatType::kFloat32, i, &xs));
  std::vector<float> y(static_cast<size_t>(m * kRows));
  if (walk == Walk::kRows) {
    std::vector<Line> scratch = lines(k.rows_scratch_bytes(w, xs));
    // In two pieces, of which the second does not begin with the first row.
    k.multiply_rows(w, xs, 0, 5, scratch.data(), y.data(), kRows);
    k.multiply_rows(w, xs, 5, kRows, scratch.data(), y.data() + 5, kRows);
    return y;
  }
  std::vector<Line> scratch = lines(k.panel_scratch_bytes(w, xs));
  const int64_t width = k.panel_rows;
  for (int64_t r = 0; r < kRows; r += width) {
    std::vector<float> sums(static_cast<size_t>(m * width));
    k.multiply_panel(w, xs, r, scratch.data(), sums.data());
    for (int64_t at = 0; at < m * width; ++at) {
      const int64_t row = r + at % width;
      if (row < kRows)
        y[static_cast<size_t>(at / width * kRows + row)] = sums[static_cast<size_t>(at)];
    }
  }
  return y;
}

void check(const std::string& text, Operand operand, Walk walk) {
  Owned w(format_of(text), kRows, kCols);
  w.fill_randomly(9);
  const std::vector<float> weight = w.decoded();
  std::vector<float> x(static_cast<size_t>(kCols * kCols)), y;
  for (int64_t c = 0; c < kCols; ++c) x[static_cast<size_t>(c * kCols + c)] = 1.0f;
  if (walk == Walk::kPanels) y = product(w.view(), operand, walk, x.data(), kCols);
  const int64_t most = operand == Operand::kTwoBytes ? 1 : active_kernels().walked_rows;
  const Accuracy level = operand == Operand::kBytes ? Accuracy::kInt8 : Accuracy::kAuto;
  int64_t first = 0, together = walk == Walk::kPanels ? kCols : 0;
  for (int64_t c = 0; c < kCols; ++c) {
    if (c == first + together) {  // one, two, ... as many as may go together
      first = c;
      together = std::min(together % most + 1, kCols - c);
      y = product(w.view(), operand, walk, x.data() + c * kCols, together);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const size_t at = static_cast<size_t>((c - first) * kRows + r);
      // As if there were no other column: x is exact, and only the level is rounded.
      PackedView view = w.view();
      double allowed = 0.0;
      if (view.family != Family::kInteger) {
        double largest = 0.0;
        for (unsigned code = 0; code < 1u << view.bits; ++code)
          largest = std::max<double>(largest, std::fabs(level_of(view, r, code)));
        const double step = largest / (level == Accuracy::kInt8 ? 127.0 : kLevelLimit);
        allowed = 0.501 * step + 3.1 * largest * 40.0 * testing::kRound;
      } else {
        allowed = ((1 << view.bits) + std::fabs(zero_of(view, r, c / view.group_size))) * 40.0 *
                  testing::kRound;
      }
      allowed *= std::fabs(scale_of(view, r, c / view.group_size));
      EXPECT_NEAR(y[at], weight[static_cast<size_t>(r * kCols + c)], allowed)
          << text << " operand " << int(operand) << " walk " << int(walk) << " row " << r
          << " column " << c;
    }
  }
}

// Sums across groups: a weight is off by what its level is, and by its own rounding to steps of its
// span; codes under one scale by neither.
void check_across_groups(const std::string& text) {
  Owned w(format_of(text), kRows, kCols);
  std::vector<float> source = testing::random_weights(kRows * kCols, 10);
  for (size_t i = 0; i < source.size(); ++i) source[i] *= static_cast<float>(1 + i / 16 % 3);
  ASSERT_TRUE(w.quantize(active_kernels(), Method::kRound, source).ok());
  const PackedView view = w.view();
  const std::vector<float> weight = w.decoded();
  std::vector<float> x(static_cast<size_t>(kCols * kCols));
  for (int64_t c = 0; c < kCols; ++c) x[static_cast<size_t>(c * kCols + c)] = 1.0f;
  const auto y =
      product(view, Operand::kWords, Walk::kPanels, x.data(), kCols, /*across_groups=*/true);
  const bool codebook = view.family != Family::kInteger;
  const bool exact = !codebook && view.groups == 1 && view.zero_kind != Zero::kFloat;
  const int64_t span =
      describe_activations(view, Operand::kWords, Walk::kPanels, 1, /*across_groups=*/true).span;
  for (int64_t c = 0; c < kCols; ++c) {
    for (int64_t r = 0; r < kRows; ++r) {
      double largest = 0.0, reach = 0.0;
      for (unsigned code = 0; codebook && code < 1u << view.bits; ++code)
        largest = std::max<double>(largest, std::fabs(level_of(view, r, code)));
      const int64_t first = c / span * span, end = std::min(first + span, kCols);
      for (int64_t at = first; at < end; at += 16) {
        const int64_t group = at / view.group_size;
        const double farthest =
            codebook ? largest : (1 << view.bits) + std::fabs(zero_of(view, r, group));
        reach = std::max(reach, std::fabs(scale_of(view, r, group)) * farthest);
      }
      const double own = codebook ? std::fabs(scale_of(view, r, c / view.group_size)) * largest *
                                        0.501 / kLevelLimit
                                  : 0.0;
      const double allowed =
          own + reach * (exact ? 0.0 : 1.15 / (kLevelLimit - 4)) + reach * 40.0 * testing::kRound;
      EXPECT_NEAR(y[static_cast<size_t>(c * kRows + r)], weight[static_cast<size_t>(r * kCols + c)],
                  allowed)
          << text << " row " << r << " column " << c;
    }
  }
}

TEST(UnitVectors, AcrossGroups) {
  for (const char* text :
       {"nf4", "nf4-g16", "nf3-g48", "nf2-g128", "kmeans4-row", "kmeans3-tensor", "int8-row",
        "int8-g64-zp", "int8-g16", "int4-g64", "int4-g16-sym", "int4-row", "int4-g32-zp-dq",
        "int3-g48", "int3-tensor", "int2-g64", "int2-row", "int2-g128-fz"}) {
    check_across_groups(text);
  }
}

TEST(UnitVectors, GiveEveryWeight) {
  for (const char* text :
       {"nf4",          "fp4-g16",     "kmeans4-row", "nf3-g48",        "nf4-g32",
        "int2-g32-zp",  "nf3-g32-dq",  "kmeans3-row", "kmeans3-tensor", "nf2-g128",
        "kmeans2-row",  "int8-row",    "int8-g64-zp", "int8-g16-fz",    "int4-g64",
        "int4-g16-sym", "int4-row-fz", "int3-g48",    "int3-g64-sym",   "int3-tensor",
        "int2-g64",     "int2-g16-zp", "int2-g128-fz"}) {
    const bool codebook = format_of(text).family() != Family::kInteger;
    for (Walk walk : {Walk::kRows, Walk::kPanels}) {
      check(text, Operand::kWords, walk);
      check(text, Operand::kBytes, walk);
    }
    if (!codebook) check(text, Operand::kTwoBytes, Walk::kRows);
  }
}

}  // namespace
}  // namespace bitfold
