#include "cuda/launch.h"

#include <gtest/gtest.h>

#include <vector>

namespace bitfold::cuda {
namespace {

RowPlan plan_of(int64_t rows, int64_t units) {
  RowPlan plan;
  const Status status = plan_rows(rows, units, &plan);
  EXPECT_TRUE(status.ok()) << status.message;
  return plan;
}

// Walks the grid as the kernel does and counts visits of each place.
void expect_each_once(int64_t rows, int64_t units) {
  const RowPlan plan = plan_of(rows, units);
  std::vector<int> visits(static_cast<size_t>(rows * units));
  for (uint32_t bx = 0; bx < plan.launch.grid_x; ++bx) {
    for (uint32_t by = 0; by < plan.launch.grid_y; ++by) {
      for (int64_t block = by; block < plan.row_blocks; block += plan.launch.grid_y) {
        for (uint32_t ty = 0; ty < plan.launch.block_y; ++ty) {
          for (uint32_t tx = 0; tx < plan.launch.block_x; ++tx) {
            const int64_t unit = int64_t{bx} * plan.launch.block_x + tx;
            for (int i = 0; i < kRowsPerThread && unit < units; ++i) {
              const int64_t row =
                  block * rows_per_block(plan.launch.block_y) + i * plan.launch.block_y + ty;
              if (row < rows) ++visits[static_cast<size_t>(row * units + unit)];
            }
          }
        }
      }
    }
  }
  for (int seen : visits) ASSERT_EQ(seen, 1) << rows << " x " << units;
}

TEST(PlanRows, EveryPlaceOnce) {
  for (int64_t rows : {1, 2, 7, 31, 33, 1000})
    for (int64_t units : {1, 2, 3, 5, 16, 31, 32, 33, 96, 1024}) expect_each_once(rows, units);
}

TEST(PlanRows, NothingToDoIsAnEmptyLaunch) {
  EXPECT_TRUE(plan_of(0, 5).launch.empty());
  EXPECT_TRUE(plan_of(5, 0).launch.empty());
}

TEST(PlanRows, BlocksAreFullAndGridsWithinCudasLimits) {
  for (int64_t rows : {int64_t{1}, int64_t{65536} * 64, int64_t{1} << 40}) {
    for (int64_t units : {int64_t{1}, int64_t{3}, int64_t{1} << 20, int64_t{1} << 35}) {
      const RowPlan plan = plan_of(rows, units);
      EXPECT_EQ(plan.launch.block_x * plan.launch.block_y, uint32_t{kThreads});
      EXPECT_LE(plan.launch.grid_x, kMaxGridX);
      EXPECT_LE(plan.launch.grid_y, kMaxGridY);
      EXPECT_GE(plan.row_blocks * rows_per_block(plan.launch.block_y), rows);
      EXPECT_GE(int64_t{plan.launch.grid_x} * plan.launch.block_x, units);
    }
  }
}

TEST(PlanRows, RowsTooLongForAGridAreNamed) {
  RowPlan plan;
  const Status status = plan_rows(1, int64_t{1} << 45, &plan);
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message.find("longer than a CUDA grid"), std::string::npos) << status.message;
}

TEST(PlanItems, AnyNumber) {
  Launch launch;
  for (int64_t n : {int64_t{0}, int64_t{1}, int64_t{257}, int64_t{1} << 48}) {
    ASSERT_TRUE(plan_items(n, &launch).ok());
    EXPECT_EQ(launch.empty(), n == 0);
    EXPECT_LE(launch.grid_x, kMaxGridX);
  }
}

}  // namespace
}  // namespace bitfold::cuda
