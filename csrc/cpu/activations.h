// Activations as integers. Every `span` of columns has one scale, x = scale * q, and integer dot
// products over a span are exact. What activations lose they lose here, once per call; levels
// of codebooks become integers too (kernels/codecs-inl.h), codes of integer grids lose nothing, but
// for spans of several units.
#pragma once

#include <cstdint>

#include "core/view.h"

namespace bitfold {

// What multiplies what in one 32-bit lane.
enum class Operand : uint8_t {
  kWords,     // two 16-bit weights, two 16-bit activations
  kTwoBytes,  // four 8-bit codes, four activations as 256 * high + low byte
  kBytes,     // four 8-bit codes, four 8-bit activations
};

// How a product walks over the weight. Both read the stored codes as 32-bit lanes.
enum class Walk : uint8_t {
  kRows,    // one row after another; the lanes of a vector are columns: for few activations
  kPanels,  // sixteen rows at once, one to a lane: for more
};

inline constexpr int kMaxBlockCols = 1024;

// Codes sit in a lane by bytes, and in a byte from high bits to low, so a vector of lanes yields
// every n-th weight: `order[i]` is the column, of 64, that comes as the i-th when one lane after
// the other gives all of its parts. Panels take activations so. In the walk over rows part p of all
// lanes comes together, and several vectors of codes are turned so that neighbours share a lane.
struct ActivationLayout {
  Operand operand;
  int64_t block_cols;   // columns that lie together
  int64_t block_bytes;  // of one row
  uint8_t order[64];
  int turned;  // rows: vectors of codes in a block, turned against each other; else 0
  int first_col_of_lane[16];  // rows: of a block, after turning; the lane's others follow it
};
struct Activations {
  const ActivationLayout* layout;
  int64_t rows;
  int64_t cols;
  int64_t unit;     // columns of a group of the weight, or of a whole part of it
  int64_t units;    // per row, a multiple of 16; the last ones may be empty
  int64_t span;     // columns that share a scale and an integer sum: a unit, or several
  int64_t blocks;   // per row
  float limit;      // largest |q|
  float sum_limit;  // largest sum of |q| over a span, so that a lane cannot overflow
  uint8_t* data;    // [blocks][rows][block_bytes]
  float* scale;     // [rows][units], those of a span that shares one alike
  float* sum;       // [rows][units]: scale * sum of q
  uint8_t* shared;  // [units], at the first of a span of several: whether it does share one

  bool sums_several_units() const { return span > unit; }
};

// Activations beyond these leave scales, or products with the scales of weights, too near the ends
// of what a float can hold. They, and infinite or NaN ones, are left to fp32 arithmetic.
inline constexpr float kLeastActivation = 1e-25f, kMostActivation = 1e30f;

// Sizes and limits for `rows` rows; pointers stay null. `across_groups`, for words in panels: a
// span is several units, and words of the weight are brought to one scale (kernels/shares-inl.h).
Activations describe_activations(const PackedView& w, Operand operand, Walk walk, int64_t rows,
                                 bool across_groups = false);

// Largest magnitude of a codebook level as an integer, and of the sum of |q| over a span: their
// product must stay below 2^31. About 13 bits for levels leave about 18 for the sum, and both sides
// lose about the same; of the numbers near there, this is the one at which the levels of nf4 are
// nearest to integers (4.8e-5 of their size, RMS).
inline constexpr int kLevelLimit = 7854;
constexpr int sum_limit_of(int64_t span) {
  return INT32_MAX / kLevelLimit - static_cast<int>(span / 2);  // rounding: half a step per column
}

}  // namespace bitfold
