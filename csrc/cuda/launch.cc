#include "cuda/launch.h"

#include <algorithm>
#include <string>

namespace bitfold::cuda {
namespace {

// Enough blocks for the largest GPU several times over; items beyond are walked.
constexpr int64_t kMaxItemBlocks = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace

Status plan_rows(int64_t rows, int64_t units, RowPlan* plan) {
  *plan = {};
  plan->rows = rows;
  plan->units = units;
  if (rows <= 0 || units <= 0) return Status::success();
  // A warp along the row, or less where that is too long for it: then the warp covers several rows.
  uint32_t along = 32;
  while (along > 1 && along / 2 >= units) along /= 2;
  plan->launch.block_x = along;
  plan->launch.block_y = kThreads / along;
  const int64_t columns = ceil_div(units, along);
  if (columns > int64_t{kMaxGridX}) {
    return Status::error(StatusCode::kInvalidArgument,
                         "a row of " + std::to_string(units) +
                             " units is longer than a CUDA grid; at most " +
                             std::to_string(int64_t{kMaxGridX} * along) + " are possible");
  }
  plan->row_blocks = ceil_div(rows, rows_per_block(plan->launch.block_y));
  plan->launch.grid_x = static_cast<uint32_t>(columns);
  plan->launch.grid_y =
      static_cast<uint32_t>(std::min<int64_t>(plan->row_blocks, int64_t{kMaxGridY}));
  return Status::success();
}

Status plan_items(int64_t n, Launch* launch) {
  *launch = {};
  if (n <= 0) return Status::success();
  launch->block_x = kThreads;
  launch->grid_x = static_cast<uint32_t>(std::min(ceil_div(n, kThreads), kMaxItemBlocks));
  return Status::success();
}

}  // namespace bitfold::cuda
