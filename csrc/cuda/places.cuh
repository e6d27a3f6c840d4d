// Walking a matrix as plan_rows() planned it.
#pragma once

#include "cuda/device.cuh"

namespace bitfold::cuda {

// body(row, unit) for the places of this thread.
template <class Body>
__device__ inline void each_place(const RowPlan& plan, const Body& body) {
  const int64_t unit = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (unit >= plan.units) return;
  const int64_t block_rows = rows_per_block(blockDim.y);
  for (int64_t block = blockIdx.y; block < plan.row_blocks; block += gridDim.y) {
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int64_t row = block * block_rows + i * blockDim.y + threadIdx.y;
      if (row >= plan.rows) break;
      body(row, unit);
    }
  }
}

// Plans [rows, units] and launches kernel(arguments…, plan).
template <class... Parameters, class... Arguments>
Status run_places(const char* name, void (*kernel)(Parameters...), int64_t rows, int64_t units,
                  cudaStream_t stream, const Arguments&... arguments) {
  RowPlan plan;
  if (Status status = plan_rows(rows, units, &plan); !status.ok()) return status;
  return run(name, kernel, plan.launch, 0, stream, arguments..., plan);
}

// Square tiles that go through shared memory, a block of threads each, so that neighbours are
// neighbours on both sides of a transposition.
inline constexpr int kTile = 32, kTileRows = kThreads / kTile;
BITFOLD_HOST_DEVICE inline int64_t tiles_across(int64_t n) { return (n + kTile - 1) / kTile; }

inline Status plan_tiles(int64_t rows, int64_t cols, Launch* launch) {
  return plan_items(tiles_across(rows) * tiles_across(cols) * kThreads, launch);
}

}  // namespace bitfold::cuda
