#include "cpu/activations.h"

#include <array>
#include <limits>

namespace bitfold {
namespace {

constexpr int kLanes = 16;

// Codes in 32 bits; of 3-bit codes, in the plane of their low two.
int codes_per_lane(int bits) { return bits == 8 ? 4 : bits == 4 ? 8 : 16; }

// `turned`: 1, 2 or 4 vectors of codes of a row; 0 for panels.
ActivationLayout make_layout(int bits, Operand operand, int turned) {
  const bool words = operand == Operand::kWords;
  const int per_lane = codes_per_lane(bits), per_byte = per_lane / 4;
  const int elements = words ? 2 : 4;  // of a lane that meet in one dot product
  ActivationLayout layout{};
  layout.operand = operand;
  layout.turned = turned;
  layout.block_cols = turned ? turned * kLanes * per_lane : 64;
  layout.block_bytes = layout.block_cols * (operand == Operand::kBytes ? 1 : 2);
  int at = 0;
  for (int lane = 0; lane < 64 / per_lane; ++lane) {
    for (int part = 0; part < per_lane / elements; ++part) {
      for (int e = 0; e < elements; ++e) {
        const int byte = words ? 2 * e + part / per_byte : e;
        const int code = byte * per_byte + per_byte - 1 - part % per_byte;
        layout.order[at++] = static_cast<uint8_t>(lane * per_lane + code);
      }
    }
  }
  // turn_lanes of the kernels, seen from where a lane of the first vector comes from.
  for (int lane = 0; turned && lane < kLanes; ++lane) {
    const int of_four = lane % 4 * turned;
    const int stored = of_four / 4 * kLanes + lane / 4 * 4 + of_four % 4;
    layout.first_col_of_lane[lane] = stored * per_lane;
  }
  return layout;
}

constexpr int kBits[] = {2, 3, 4, 8};
constexpr Operand kOperands[] = {Operand::kWords, Operand::kTwoBytes, Operand::kBytes};
constexpr int kTurned[] = {0, 1, 2, 4};

// As many vectors of codes are turned as a unit has lanes, so that none holds two units.
const ActivationLayout& activation_layout(int bits, Operand operand, Walk walk, int64_t unit) {
  static const auto all = [] {
    std::array<ActivationLayout, 4 * 3 * 4> made;
    size_t at = 0;
    for (int b : kBits)
      for (Operand o : kOperands)
        for (int turned : kTurned) made[at++] = make_layout(b, o, turned);
    return made;
  }();
  const size_t row = bits == 8 ? 3 : static_cast<size_t>(bits - 2);
  const int64_t lanes = unit / codes_per_lane(bits);
  const size_t kind = walk == Walk::kPanels ? 0 : lanes >= 4 ? 3 : lanes == 2 ? 2 : 1;
  return all[(row * 3 + static_cast<size_t>(operand)) * 4 + kind];
}

// Columns that share a scale: 64, or what divides the group size.
int64_t activation_unit(const PackedView& w) {
  if (w.groups == 1) return 64;
  for (int64_t unit : {64, 32}) {
    if (w.group_size % unit == 0) return unit;
  }
  return 16;
}

// Columns of a span of several units: a whole part of what panels expand at a time (PanelReader),
// and not so many that their integers lose what the rounding of y to bfloat16 would not hide.
int64_t wide_span(int bits) { return bits == 8 ? 128 : 256; }

}  // namespace

Activations describe_activations(const PackedView& w, Operand operand, Walk walk, int64_t rows,
                                 bool across_groups) {
  Activations x{};
  x.rows = rows;
  x.cols = w.cols;
  x.unit = activation_unit(w);
  x.span = across_groups ? wide_span(w.bits) : x.unit;
  x.layout = &activation_layout(w.bits, operand, walk, x.unit);
  x.blocks = (w.cols + x.layout->block_cols - 1) / x.layout->block_cols;
  x.units = (x.blocks * x.layout->block_cols / x.unit + 15) / 16 * 16;
  x.sum_limit = std::numeric_limits<float>::infinity();
  switch (operand) {
    case Operand::kWords:
      x.limit = 32767.0f;
      if (w.family != Family::kInteger || across_groups)
        x.sum_limit = static_cast<float>(sum_limit_of(x.span));
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
