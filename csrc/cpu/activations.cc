#include "cpu/activations.h"

#include <array>
#include <limits>

namespace bitfold {
namespace {

constexpr int kLanes = 16;

ActivationLayout make_layout(int bits, Operand operand, Walk walk) {
  const bool words = operand == Operand::kWords;
  const int per_byte = bits == 8 ? 1 : bits == 4 ? 2 : 4;  // 3 bits: the plane of the low two
  const int per_lane = 4 * per_byte;
  const int elements = words ? 2 : 4;  // of a lane that meet in one dot product
  const int parts = per_lane / elements;

  // The column of element e of part p of lane j.
  const auto column = [&](int j, int p, int e) {
    const int byte = words ? 2 * e + p / per_byte : e;
    return j * per_lane + byte * per_byte + per_byte - 1 - p % per_byte;
  };
  ActivationLayout layout{};
  layout.operand = operand;
  layout.block_cols = walk == Walk::kRows ? kLanes * per_lane : 64;
  layout.block_bytes = layout.block_cols * (operand == Operand::kBytes ? 1 : 2);
  const int lanes = static_cast<int>(layout.block_cols) / per_lane;
  int at = 0;
  if (walk == Walk::kRows) {
    for (int p = 0; p < parts; ++p)
      for (int j = 0; j < lanes; ++j)
        for (int e = 0; e < elements; ++e)
          layout.order[at++] = static_cast<int16_t>(column(j, p, e));
  } else {
    for (int j = 0; j < lanes; ++j)
      for (int p = 0; p < parts; ++p)
        for (int e = 0; e < elements; ++e)
          layout.order[at++] = static_cast<int16_t>(column(j, p, e));
  }
  return layout;
}

const ActivationLayout& activation_layout(int bits, Operand operand, Walk walk) {
  static const auto all = [] {
    std::array<ActivationLayout, 4 * 3 * 2> made;
    size_t at = 0;
    for (int b : {2, 3, 4, 8})
      for (Operand o : {Operand::kWords, Operand::kTwoBytes, Operand::kBytes})
        for (Walk w : {Walk::kRows, Walk::kPanels}) made[at++] = make_layout(b, o, w);
    return made;
  }();
  const size_t row = bits == 8 ? 3 : static_cast<size_t>(bits - 2);
  return all[(row * 3 + static_cast<size_t>(operand)) * 2 + static_cast<size_t>(walk)];
}

// Columns that share a scale: 64, or what divides the group size.
int64_t activation_unit(const PackedView& w) {
  if (w.groups == 1) return 64;
  for (int64_t unit : {64, 32}) {
    if (w.group_size % unit == 0) return unit;
  }
  return 16;
}

}  // namespace

Activations describe_activations(const PackedView& w, Operand operand, Walk walk, int64_t rows) {
  Activations x{};
  x.layout = &activation_layout(w.bits, operand, walk);
  x.rows = rows;
  x.cols = w.cols;
  x.unit = activation_unit(w);
  x.blocks = (w.cols + x.layout->block_cols - 1) / x.layout->block_cols;
  x.units = (x.blocks * x.layout->block_cols / x.unit + 15) / 16 * 16;
  x.sum_limit = std::numeric_limits<float>::infinity();
  switch (operand) {
    case Operand::kWords:
      x.limit = 32767.0f;
      if (w.family != Family::kInteger) x.sum_limit = static_cast<float>(kSumLimit);
      break;
    case Operand::kTwoBytes:
      x.limit = 32639.0f;  // 127 * 256 + 127
      break;
    case Operand::kBytes:
      x.limit = 127.0f;
      break;
  }
  return x;
}

}  // namespace bitfold
