// Which kernel multiplies, and how a product is cut up for it: plain arithmetic, tested on the host
// for every odd shape.
#pragma once

#include <cstdint>

#include "core/float16.h"
#include "core/view.h"

namespace bitfold::cuda {

// What of a GPU the cutting depends on: the same numbers on the same kind of GPU, so the same bits.
struct GpuLimits {
  int multiprocessors = 132;
  int shared_bytes = 227 * 1024;  // most that one block may have
};

enum class Way : uint8_t {
  kNothing,  // the result is empty
  kMma,      // linear_mma: 16-bit x, few rows of it, straight from the codes through tensor cores
  kAny,      // linear_any: any format, shape and address, in fp32
  kSlabs,    // rows of the weight at a time as floats in scratch, and the product of dense matrices
};

// `floats`: fp32 arithmetic was asked for. `aligned`: codes and x begin at multiples of 16 bytes.
Way choose_way(const PackedView& w, FloatType x, int64_t m, bool floats, bool aligned);

// Whether linear_mma can serve a weight at all.
bool suits_mma(const PackedView& w);

// Warps of a block, for so many tiles of eight rows of x.
constexpr int most_mma_warps(int column_tiles) { return column_tiles == 8 ? 8 : 16; }

struct MmaPlan {
  int64_t m = 0;
  int column_tiles = 1;  // of eight rows of x; 1, 2, 4 or 8
  int warps = 0, row_warps = 1, k_warps = 1;
  int64_t row_tiles = 0;  // of 16 * row_warps rows of the weight
  int chunks = 0;         // of columns (mma_maps.h), of which a slice has slice_chunks
  int slices = 1, slice_chunks = 0;
  int slab_chunks = 0;  // for which x and scales lie in shared memory at a time
  uint32_t grid = 0;    // blocks; each walks row_tiles * slices with a stride of the grid

  // Bytes from the start of shared memory, behind the table of pairs.
  int rings = 0, x = 0, scales = 0, shifts = 0, sums = 0, shared_bytes = 0;

  BITFOLD_HOST_DEVICE int rows_per_tile() const { return 16 * row_warps; }
  // A row more than there are, so that scales of one row lie in different banks.
  BITFOLD_HOST_DEVICE int scale_stride() const { return rows_per_tile() + 1; }
  BITFOLD_HOST_DEVICE int sum_stride() const { return 8 * column_tiles; }
  // Rows of x that places are left for: an odd number of them, so that the halves of a segment,
  // which are written together, lie in different banks.
  BITFOLD_HOST_DEVICE int x_columns() const { return static_cast<int>(m) | 1; }
  // Partial results [slices, m, rows] in fp32; none where one slice does it all.
  int64_t partials(int64_t rows) const { return slices > 1 ? slices * m * rows : 0; }
};

// False where no cut fits the GPU's shared memory. 1 <= m <= kMaxMmaColumns.
inline constexpr int64_t kMaxMmaColumns = 64;
bool plan_mma(const PackedView& w, int64_t m, const GpuLimits& gpu, MmaPlan* plan);

// linear_any: a warp for two rows of the weight, and one or eight rows of x.
struct AnyPlan {
  int columns = 1;  // rows of x at a time
  int64_t row_blocks = 0, column_blocks = 0;
  uint32_t grid_x = 0, grid_y = 0;
};
inline constexpr int kAnyWarps = 8, kAnyRows = 2;
AnyPlan plan_any(int64_t m, int64_t rows);

// Rows of x that linear_mma takes at a time, where there are more than it can: shares of the same
// length, but for the last.
int64_t mma_pass(int64_t m);

// Slabs: how many rows (or columns) of a matrix, `length` of them of `other` floats each, lie in
// scratch at a time to be multiplied by m rows of x.
int64_t slab_length(int64_t length, int64_t other, int64_t m, FloatType dtype,
                    const GpuLimits& gpu);

}  // namespace bitfold::cuda
