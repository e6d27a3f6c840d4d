#include "core/view.h"

#include "core/bitpack.h"
#include "support.h"

namespace bitfold {
namespace {

using testing::format_of;
using testing::Owned;

TEST(View, ReadsScaleZeroAndLevelOfTheRightGroup) {
  Owned w(format_of("int4-g64"), 3, 130);
  auto* scale = reinterpret_cast<uint16_t*>(w.buffer(BufferRole::kScale));
  for (int i = 0; i < 9; ++i) scale[i] = float_to_half(static_cast<float>(i + 1));
  *w.buffer(BufferRole::kExponent) = static_cast<uint8_t>(-2);
  const uint8_t zeros[3] = {5, 6, 7};
  for (int r = 0; r < 3; ++r) pack_row(zeros, 3, 4, w.buffer(BufferRole::kZero) + 2 * r);
  const PackedView view = w.view();
  EXPECT_EQ(view.groups, 3);
  for (int r = 0; r < 3; ++r) {
    for (int g = 0; g < 3; ++g) {
      EXPECT_EQ(scale_of(view, r, g), (3 * r + g + 1) * 0.25f);
      EXPECT_EQ(zero_of(view, r, g), 5.0f + g);
    }
  }
}

TEST(View, OneScaleServesTheTensor) {
  Owned w(format_of("int8-tensor-zp"), 4, 10);
  *reinterpret_cast<uint16_t*>(w.buffer(BufferRole::kScale)) = float_to_half(0.5f);
  *w.buffer(BufferRole::kZero) = 200;
  for (int r = 0; r < 4; ++r) {
    EXPECT_EQ(scale_of(w.view(), r, 0), 0.5f);
    EXPECT_EQ(zero_of(w.view(), r, 0), 200.0f);
  }
}

TEST(View, ZeroOfEachGrid) {
  EXPECT_EQ(zero_of(Owned(format_of("int8-row"), 1, 1).view(), 0, 0), 128.0f);
  EXPECT_EQ(zero_of(Owned(format_of("int4-g64-sym"), 1, 1).view(), 0, 0), 8.0f);
  EXPECT_EQ(zero_of(Owned(format_of("int2-g64"), 1, 1).view(), 0, 0), 1.5f);
  Owned fz(format_of("int4-g64-fz"), 1, 1);
  *reinterpret_cast<uint16_t*>(fz.buffer(BufferRole::kZero)) = float_to_half(7.25f);
  EXPECT_EQ(zero_of(fz.view(), 0, 0), 7.25f);
}

TEST(View, DoubleQuantizedScalesFindTheirBlock) {
  Owned w(format_of("nf4-g16"), 3, 16 * 100);  // 300 scales: two blocks
  for (int i = 0; i < 300; ++i) w.buffer(BufferRole::kScale)[i] = 255;
  auto* absmax = reinterpret_cast<float*>(w.buffer(BufferRole::kScaleAbsmax));
  absmax[0] = 2.0f;
  absmax[1] = 3.0f;
  *reinterpret_cast<float*>(w.buffer(BufferRole::kScaleOffset)) = 0.5f;
  EXPECT_EQ(scale_of(w.view(), 2, 55), 2.5f);
  EXPECT_EQ(scale_of(w.view(), 2, 56), 3.5f);
}

TEST(View, LearnedLevelsPerRowOrPerTensor) {
  for (const char* text : {"kmeans2-row", "kmeans2-tensor"}) {
    const bool per_row = std::string(text) == "kmeans2-row";
    Owned w(format_of(text), 2, 5);
    auto* levels = reinterpret_cast<uint16_t*>(w.buffer(BufferRole::kCodebook));
    for (int i = 0; i < (per_row ? 8 : 4); ++i) levels[i] = float_to_half(static_cast<float>(i));
    *w.buffer(BufferRole::kExponent) = 3;
    EXPECT_EQ(level_of(w.view(), 0, 2), 16.0f);
    EXPECT_EQ(level_of(w.view(), 1, 2), per_row ? 48.0f : 16.0f);
  }
}

}  // namespace
}  // namespace bitfold
