// How a pass over the columns of a matrix is cut: sections, whose correction is one product of
// matrices, and in them blocks, which a kernel rounds. Both count positions (solvers/factor.h).
#pragma once

#include <cstdint>
#include <vector>

namespace bitfold {

inline constexpr int64_t kSectionColumns = 512;  // products of a few hundred columns run at full
                                                 // speed

struct Block {  // of positions [low, high), at most kFeedbackColumns
  int64_t low, high;
  int64_t group_low;  // where the group begins that starts with this block, else -1
};
struct Section {
  int64_t low, high;
  std::vector<Block> blocks;
};

// From the last position, which is rounded first, to the first.
std::vector<Section> plan_sections(int64_t n);

// The same with no group in two sections. Groups must be contiguous in `column` [n], the columns by
// position.
std::vector<Section> plan_sections_by_group(const std::vector<int32_t>& column, int64_t group_size);

}  // namespace bitfold
