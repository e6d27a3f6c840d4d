#include "solvers/sections.h"

#include <algorithm>

#include "cpu/kernel_table.h"

namespace bitfold {

std::vector<Section> plan_sections(int64_t n) {
  std::vector<Section> all;
  for (int64_t high = n; high > 0; high = all.back().low) {
    all.push_back({std::max<int64_t>(0, high - kSectionColumns), high, {}});
    for (int64_t end = high; end > all.back().low; end = all.back().blocks.back().low)
      all.back().blocks.push_back({std::max(all.back().low, end - kFeedbackColumns), end, -1});
  }
  return all;
}

std::vector<Section> plan_sections_by_group(const std::vector<int32_t>& column,
                                            int64_t group_size) {
  std::vector<Section> all;
  const auto group_at = [&](int64_t position) {
    return column[static_cast<size_t>(position)] / group_size;
  };
  for (int64_t high = static_cast<int64_t>(column.size()); high > 0;) {
    int64_t low = high - 1;
    while (low > 0 && group_at(low - 1) == group_at(high - 1)) --low;
    const bool joins =
        !all.empty() && high - low <= kFeedbackColumns && all.back().high - low <= kSectionColumns;
    if (!joins) all.push_back({low, high, {}});
    Section& section = all.back();
    section.low = low;
    for (int64_t end = high; end > low; end = section.blocks.back().low) {
      section.blocks.push_back(
          {std::max(low, end - kFeedbackColumns), end, end == high ? low : -1});
    }
    high = low;
  }
  return all;
}

}  // namespace bitfold
