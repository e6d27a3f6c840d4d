// What the warps of a linear_mma block share, for a slab of columns: x, scales and zero points.
#pragma once

#include "cuda/device.cuh"
#include "cuda/linear_plan.h"
#include "cuda/mma_maps.h"

namespace bitfold::cuda {

struct MmaTask {
  DeviceWeight w;
  MmaPlan plan;
  float level_factor;  // of levels (level_factor.h), which scales make good
  const void* x;       // [m, cols]
  const void* bias;    // [rows] of x's type, or null
  void* y;             // [m, rows] of x's type, or, with several slices, null
  float* partial;      // [slices, m, rows], with several slices
};

// Columns of a slab, counted in segments of the weight.
struct Slab {
  int64_t first;  // segment
  int segments;
};

template <bool kInterleave>
__device__ inline void stage_x(const MmaTask& task, const Slab& slab, uint8_t* shared) {
  const int64_t cols = task.w.view.cols;
  const int m = static_cast<int>(task.plan.m), columns = task.plan.x_columns();
  const unsigned units = static_cast<unsigned>(slab.segments) * (kSegment / 8);
  const auto* x = static_cast<const uint8_t*>(task.x);
  // One division for all: a step of a whole block is so many rows of x and so many units.
  const unsigned column_step = blockDim.x / units, unit_step = blockDim.x - column_step * units;
  unsigned column = threadIdx.x / units, unit = threadIdx.x - column * units;
#pragma unroll 2
  while (column < static_cast<unsigned>(m)) {
    const int64_t k = slab.first * kSegment + int64_t{unit} * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (k < cols) v = __ldg(reinterpret_cast<const uint4*>(x + (column * cols + k) * 2));
    if constexpr (kInterleave) {
      uint32_t words[4] = {v.x, v.y, v.z, v.w};
      interleave(words);
      v = make_uint4(words[0], words[1], words[2], words[3]);
    }
    *reinterpret_cast<uint4*>(
        shared + task.plan.x +
        x_place_of_unit(static_cast<int>(unit), static_cast<int>(column), columns)) = v;
    unit += unit_step;
    const bool over = unit >= units;
    unit -= over ? units : 0;
    column += column_step + over;
  }
}

// A warp for a row, lanes along its segments. All loads of a batch of places before the first use
// of one: this is what the first products wait for. Fewer where accumulators leave fewer registers.
template <int kTiles>
inline constexpr int kBatch = kTiles == 1   ? 6
                              : kTiles == 2 ? 4
                                            : 2;

struct Place {
  int row, segment;
  __device__ void advance(int rows, int segments) {
    segment += 32;
    if (segment < segments) return;
    segment = static_cast<int>(threadIdx.x) % 32;
    row += rows;
  }
};

template <int kBatch, class Value>
__device__ inline void stage_by_row(const MmaPlan& plan, const Slab& slab, float* to, Value value) {
  const int rows = plan.rows_per_tile(), stride = plan.scale_stride();
  Place at{static_cast<int>(threadIdx.x) / 32, static_cast<int>(threadIdx.x) % 32};
  if (at.segment >= slab.segments) return;
  while (at.row < rows) {
    float v[kBatch];
    Place from = at;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, at.advance(plan.warps, slab.segments))
      v[i] = at.row < rows ? value(at.row, at.segment) : 0.0f;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, from.advance(plan.warps, slab.segments))
      if (from.row < rows) to[from.segment * stride + from.row] = v[i];
  }
}

// A view of the tile's rows alone, so that places in it are small numbers. Scales are counted from
// the last whole block of 256 before them, which those that are double quantized share an absmax
// with.
struct TileRows {
  PackedView view;
  int before;    // scales of that block before the tile's first
  int last_row;  // rows behind the last of the weight are taken to be it
  int stride;
  int first_segment, last_segment;
  uint32_t inverse;  // 2^32 over the segments of a group, rounded up; 0 where there is one of them

  __device__ TileRows(const PackedView& whole, int64_t row, const Slab& slab) : view(whole) {
    const int64_t first = row * whole.scale_row_stride;
    const int64_t block = first / kDoubleQuantBlock;
    const int size = whole.scale_kind == ScaleKind::kFp32   ? 4
                     : whole.scale_kind == ScaleKind::kFp16 ? 2
                                                            : 1;
    view.scale = static_cast<const uint8_t*>(whole.scale) + block * kDoubleQuantBlock * size;
    view.scale_absmax = whole.scale_absmax + block;
    if (whole.zero_kind == Zero::kInt)
      view.zero = static_cast<const uint8_t*>(whole.zero) + row * whole.zero_row_bytes;
    if (whole.zero_kind == Zero::kFloat)
      view.zero = static_cast<const uint16_t*>(whole.zero) + first;
    before = static_cast<int>(first % kDoubleQuantBlock);
    last_row = static_cast<int>(min(whole.rows - 1 - row, int64_t{1} << 20));
    stride = static_cast<int>(whole.scale_row_stride);
    first_segment = static_cast<int>(slab.first);
    // Behind the last column any scale will do, since x is zero there.
    last_segment = static_cast<int>((whole.cols - 1) / kSegment);
    inverse = inverse_of_segments(whole);
  }
  __device__ int row(int r) const { return min(r, last_row); }
  __device__ int group(int segment) const {
    const int at = min(first_segment + segment, last_segment);
    return inverse ? static_cast<int>(__umulhi(static_cast<uint32_t>(at), inverse)) : at;
  }
};

template <ScaleKind kKind, int kBatch>
__device__ inline void stage_scales(const MmaTask& task, const Values& values, const Slab& slab,
                                    TileRows tile, float* to) {
  const float undo = 1.0f / task.level_factor;
  tile.view.scale_kind = kKind;  // known to the compiler, so that it finds no branch between loads
  stage_by_row<kBatch>(task.plan, slab, to, [&](int row, int segment) {
    return scale_at(tile.view, values, kDeviceDynamicMap, 0,
                    tile.before + tile.row(row) * tile.stride + tile.group(segment)) *
           undo;
  });
}

template <Zero kKind, int kBatch>
__device__ inline void stage_shifts(const MmaTask& task, const Slab& slab, TileRows tile,
                                    const float* scales, float* to) {
  tile.view.zero_kind = kKind;
  const float middle = middle_of(task.w.view);
  const int stride = task.plan.scale_stride();
  // The scale was put there by the same thread.
  stage_by_row<kBatch>(task.plan, slab, to, [&](int row, int segment) {
    return (middle - zero_at(tile.view, tile.row(row), tile.group(segment))) *
           scales[segment * stride + row];
  });
}

template <int kBatch>
__device__ inline void stage_parameters(const MmaTask& task, const Values& values, int64_t row,
                                        const Slab& slab, uint8_t* shared) {
  const PackedView& view = task.w.view;
  const TileRows tile(view, row, slab);
  auto* scales = reinterpret_cast<float*>(shared + task.plan.scales);
  switch (view.scale_kind) {
    case ScaleKind::kFp32:
      stage_scales<ScaleKind::kFp32, kBatch>(task, values, slab, tile, scales);
      break;
    case ScaleKind::kFp16:
      stage_scales<ScaleKind::kFp16, kBatch>(task, values, slab, tile, scales);
      break;
    default:
      stage_scales<ScaleKind::kDoubleQuant, kBatch>(task, values, slab, tile, scales);
  }
  if (view.family != Family::kInteger) return;
  auto* shifts = reinterpret_cast<float*>(shared + task.plan.shifts);
  if (view.zero_kind == Zero::kInt)
    stage_shifts<Zero::kInt, kBatch>(task, slab, tile, scales, shifts);
  if (view.zero_kind == Zero::kFloat)
    stage_shifts<Zero::kFloat, kBatch>(task, slab, tile, scales, shifts);
  if (view.zero_kind == Zero::kMidrise && view.bits == 8)
    stage_shifts<Zero::kMidrise, kBatch>(task, slab, tile, scales, shifts);
}

// Sums of x over a segment, of the numbers that the tensor cores see; zero for rows of x that there
// are not.
template <FloatType kType, int kTiles>
__device__ inline void sum_x(const MmaTask& task, const Slab& slab, uint8_t* shared) {
  constexpr int stride = kTiles * kMmaColumns;
  const int m = static_cast<int>(task.plan.m);
  auto* sums = reinterpret_cast<float*>(shared + task.plan.sums);
  for (int i = static_cast<int>(threadIdx.x); i < slab.segments * stride; i += blockDim.x) {
    const int segment = i / stride, column = i - segment * stride;
    float sum = 0.0f;
    for (int unit = 0; unit < 8 && column < m; ++unit) {
      const auto* at = reinterpret_cast<const uint4*>(
          shared + task.plan.x +
          x_place(segment, unit % 2, column, task.plan.x_columns(), unit / 2));
      const uint4 v = *at;
      for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
        const auto low = static_cast<uint16_t>(word), high = static_cast<uint16_t>(word >> 16);
        sum += kType == FloatType::kFloat16 ? from_half(low) + from_half(high)
                                            : bfloat16_to_float(low) + bfloat16_to_float(high);
      }
    }
    sums[i] = sum;
  }
}

}  // namespace bitfold::cuda
