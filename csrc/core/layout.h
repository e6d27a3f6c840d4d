// How the codes of a weight lie in memory. Files and state_dicts know rows alone (docs/format.md);
// panels are made of them, of the very same size, where a CPU is to multiply (docs/kernels.md):
//
//   [rows / 16] panels, in each
//     [words of a row][16 rows]      32 bits of codes; of 3-bit ones, of the plane of their low
//     bits [half-words of a row][16 rows]                   and 16 of the plane of their third
#pragma once

#include <cstdint>

#include "core/format.h"

namespace bitfold {

enum class Layout : uint8_t { kRows, kPanels };

inline constexpr int64_t kPanelHeight = 16, kPanelStep = 64;  // rows and columns are multiples

// Whether a weight can lie in panels. Rows with levels of their own would need as many tables.
inline bool suits_panels(const Format& format, int64_t rows, int64_t cols) {
  const bool own_levels =
      format.family() == Family::kLearnedCodebook && format.grouping != Grouping::kTensor;
  return rows % kPanelHeight == 0 && cols % kPanelStep == 0 && !own_levels;
}

}  // namespace bitfold
