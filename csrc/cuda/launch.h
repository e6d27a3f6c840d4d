// How much work goes to which thread: plain arithmetic, tested on the host for every odd shape.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/float16.h"
#include "core/status.h"

namespace bitfold::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kRowsPerThread = 4;  // independent loads that a thread has in flight
inline constexpr uint32_t kMaxGridX = 0x7fffffffu, kMaxGridY = 65535;
// Shared memory that a block may have unless its kernel was allowed more.
inline constexpr size_t kMaxSharedBytes = 48 * 1024;

struct Launch {
  uint32_t grid_x = 0, grid_y = 1, block_x = 1, block_y = 1;
  bool empty() const { return grid_x == 0; }
};

// Rows of units (several weights that a thread handles at once): threads lie along a row first,
// where their accesses are neighbours, then across rows; each takes kRowsPerThread rows. No
// division by anything that is not a power of two.
struct RowPlan {
  Launch launch;
  int64_t rows = 0, units = 0;  // units per row
  int64_t row_blocks = 0;       // walked with a stride of grid_y
};

Status plan_rows(int64_t rows, int64_t units, RowPlan* plan);

// Rows that one block takes.
BITFOLD_HOST_DEVICE inline int64_t rows_per_block(uint32_t block_y) {
  return int64_t{block_y} * kRowsPerThread;
}

// n items, one a thread at a time, walked with a stride of the whole grid.
Status plan_items(int64_t n, Launch* launch);

}  // namespace bitfold::cuda
