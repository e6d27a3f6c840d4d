// y = x wᵀ + bias for few rows of x of 16 bits, straight from the stored codes.
//
// A block owns sixteen rows of the weight per row warp and walks its slice of the columns. Each
// warp brings chunks of its own rows and columns into shared memory ahead of time (kStages of
// them), makes operands of two codes at once (mma_maps.h), multiplies on tensor cores
// one segment of 64 columns at a time, and adds scale * product in fp32. x, scales and zero points
// of a slab of columns lie in shared memory for all warps. At the end the warps' sums are added in
// one order.
#pragma once

#include "cuda/mma_staging.cuh"
#include "cuda/ptx.cuh"

namespace bitfold::cuda {

// Sixty-four rows of x have so many accumulators that half as many threads share the registers.
template <int kTiles>
inline constexpr int kMmaThreads = most_mma_warps(kTiles) * 32;

// ---- what a warp has for itself: its ring of chunks

template <int kBits>
struct Ring {
  using C = Chunk<kBits>;
  uint8_t* stages;
  int limit[kBits == 3 ? 2 : 1];  // chunks in which this lane's bytes are the row's
  const uint8_t* codes;           // of the first row
  uint32_t source[C::kCopies];    // of the rows that this lane fetches from, counted from there

  __device__ Ring(const PackedView& view, uint8_t* at, int64_t row) : stages(at) {
    const int64_t first = min(row, view.rows - 1);
    codes = view.codes + first * view.row_bytes;
    const int last = static_cast<int>(min(view.rows - 1 - first, int64_t{15}));
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t plane = kBits == 3 ? view.plane_bytes : view.row_bytes;
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) {
      const Copy copy = copy_of<kBits>(i, lane);
      const int width = copy.high ? C::kHighBytes : C::kRowBytes;
      // A lane's place within a row is the same in all its copies from one plane.
      limit[copy.high] = static_cast<int>(
          ((copy.high ? view.row_bytes - plane : plane) - copy.source + width - 1) / width);
      // Rows that there are not: the last one once more; nobody stores what comes of it.
      source[i] = static_cast<uint32_t>(min(copy.row, last) * view.row_bytes + copy.source +
                                        (copy.high ? plane : 0));
    }
  }
  __device__ uint8_t* stage(int i) const { return stages + i * C::kBytes; }

  // Always a group of copies, if need be an empty one, so that counting them tells what is there.
  __device__ void fetch(int chunk, bool wanted, int to) const {
    if (wanted) {
#pragma unroll
      for (int i = 0; i < C::kCopies; ++i) {
        const Copy copy = copy_of<kBits>(i, static_cast<int>(threadIdx.x) % 32);
        const bool there = chunk < limit[copy.high];
        const uint32_t at = static_cast<uint32_t>(chunk) *
                            static_cast<uint32_t>(copy.high ? C::kHighBytes : C::kRowBytes);
        copy_async(stage(to) + copy.target, codes + (source[i] + (there ? at : 0)), there);
      }
    }
    commit_copies();
  }
};

// Where a lane reads what the warps share, for the first segment of a slab; strides in bytes.
struct SharedPlaces {
  const uint8_t *x, *scales, *shifts, *sums;
  int x_half, scale_stride, sum_stride;

  __device__ SharedPlaces(const MmaPlan& plan, const uint8_t* shared, int row_warp) {
    const Lane at = lane_of(static_cast<int>(threadIdx.x) % 32);
    const int m = static_cast<int>(plan.m), row = row_warp * kMmaRows + at.row;
    // Rows of x that there are not: in a single tile the last one once more, which costs no
    // bandwidth; else whatever lies there. Nobody stores what comes of it.
    const int column = plan.column_tiles == 1 ? min(at.row, m - 1) : at.row;
    x = shared + plan.x + x_place(0, 0, column, plan.x_columns(), at.quarter);
    scales = shared + plan.scales + row * 4;
    shifts = shared + plan.shifts + row * 4;
    sums = shared + plan.sums + at.quarter * 8;
    x_half = plan.x_columns() * 64;
    scale_stride = plan.scale_stride() * 4;
    sum_stride = plan.sum_stride() * 4;
  }
};

__device__ inline float shared_float(const uint8_t* at) {
  return *reinterpret_cast<const float*>(at);
}

template <int kBits, FloatType kType, Decoding kDecoding, int kTiles>
__device__ inline void multiply_chunk(const uint8_t* stage, const SharedPlaces& places, int segment,
                                      const uint8_t* table, float (&acc)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Lane at = lane_of(lane);
  const uint8_t* x = places.x + segment * 2 * places.x_half;
  const uint8_t* scales = places.scales + segment * places.scale_stride;
#pragma unroll(kTiles > 2 ? 1 : kTiles == 2 ? 2 : 4)  // more would be held than fits registers
  for (int s = 0; s < Chunk<kBits>::kSegments; ++s) {
    const LaneCodes upper = load_codes<kBits>(stage, at.row, s, at.quarter);
    const LaneCodes lower = load_codes<kBits>(stage, at.row + 8, s, at.quarter);
    MmaA a[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      a[step] = operand_of<kBits, kType, kDecoding>(upper, lower, step, lane, table);
    const float upper_scale = shared_float(scales), lower_scale = shared_float(scales + 32);
    const uint8_t* second_x = x + places.x_half;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint4 first = *reinterpret_cast<const uint4*>(x + n * kMmaColumns * 64);
      const uint4 second = *reinterpret_cast<const uint4*>(second_x + n * kMmaColumns * 64);
      float d[4];
      mma_16x8x16_fresh<kType>(d, a[0].word, first.x, first.y);
      mma_16x8x16<kType>(d, a[1].word, first.z, first.w);
      mma_16x8x16<kType>(d, a[2].word, second.x, second.y);
      mma_16x8x16<kType>(d, a[3].word, second.z, second.w);
      acc[n][0] = fmaf(upper_scale, d[0], acc[n][0]);
      acc[n][1] = fmaf(upper_scale, d[1], acc[n][1]);
      acc[n][2] = fmaf(lower_scale, d[2], acc[n][2]);
      acc[n][3] = fmaf(lower_scale, d[3], acc[n][3]);
    }
    x = second_x + places.x_half;
    scales += places.scale_stride;
  }
}

// What zero points add: (middle - zero) * scale * sum of x, segment by segment.
template <int kSegments, int kTiles>
__device__ inline void add_shifts(const SharedPlaces& places, int segment,
                                  float (&acc)[kTiles][4]) {
#pragma unroll
  for (int s = 0; s < kSegments; ++s, ++segment) {
    const uint8_t* shifts = places.shifts + segment * places.scale_stride;
    const float upper = shared_float(shifts), lower = shared_float(shifts + 32);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 sum = *reinterpret_cast<const float2*>(
          places.sums + segment * places.sum_stride + n * kMmaColumns * 4);
      acc[n][0] = fmaf(upper, sum.x, acc[n][0]);
      acc[n][1] = fmaf(upper, sum.y, acc[n][1]);
      acc[n][2] = fmaf(lower, sum.x, acc[n][2]);
      acc[n][3] = fmaf(lower, sum.y, acc[n][3]);
    }
  }
}

template <FloatType kType>
__device__ inline float as_float(const void* data, int64_t i) {
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return kType == FloatType::kFloat16 ? from_half(bits) : bfloat16_to_float(bits);
}

// The warps' accumulators, which lie [warp][column][row], added over the warps that shared columns.
template <FloatType kType, int kTiles>
__device__ inline void store_tile(const MmaTask& task, int64_t row, int slice, const float* sums) {
  const MmaPlan& plan = task.plan;
  const int rows = plan.rows_per_tile(), m = static_cast<int>(plan.m);
  const int shift = 31 - __clz(rows);  // a power of two
  for (int i = static_cast<int>(threadIdx.x); i < rows * m; i += blockDim.x) {
    const int r = i & (rows - 1), column = i >> shift;
    if (row + r >= task.w.view.rows) continue;
    float sum = 0.0f;
    for (int k = 0; k < plan.k_warps; ++k) {
      const int warp = r / kMmaRows * plan.k_warps + k;
      sum += sums[(warp * kTiles * kMmaColumns + column) * kMmaRows + r % kMmaRows];
    }
    const int64_t at = column * task.w.view.rows + row + r;
    if (task.partial) {
      task.partial[int64_t{slice} * m * task.w.view.rows + at] = sum;
      continue;
    }
    if (task.bias) sum += as_float<kType>(task.bias, row + r);
    static_cast<uint16_t*>(task.y)[at] = static_cast<uint16_t>(to_pair<kType>(sum, 0.0f));
  }
}

template <int kBits, FloatType kType, int kTiles, Decoding kDecoding>
__global__ void __launch_bounds__(kMmaThreads<kTiles>, 1)
    linear_mma(const __grid_constant__ MmaTask task) {
  uint8_t* shared = block_memory();
  const MmaPlan& plan = task.plan;
  const PackedView& view = task.w.view;
  const Values values = read_values(task.w.addresses);
  constexpr int kSegments = Chunk<kBits>::kSegments;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row_warp = warp / plan.k_warps, k_warp = warp % plan.k_warps;
  const bool shifted = is_shifted(view);
  const uint32_t row_tiles = static_cast<uint32_t>(plan.row_tiles);
  const uint32_t tiles = row_tiles * static_cast<uint32_t>(plan.slices);

  bool tabled = kDecoding == Decoding::kArithmetic;
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int slice = static_cast<int>(tile / row_tiles);
    const int64_t row = int64_t{tile - slice * row_tiles} * plan.rows_per_tile();
    const int begin = slice * plan.slice_chunks;
    const int end = min(begin + plan.slice_chunks, plan.chunks);
    const Ring<kBits> ring(view, shared + plan.rings + warp * kStages * Chunk<kBits>::kBytes,
                           row + row_warp * kMmaRows);
    const SharedPlaces places(plan, shared, row_warp);
    int next = begin + k_warp;  // to fetch
    int from = 0, to = 0;       // stages
#pragma unroll
    for (; to < kStages - 1; ++to, next += plan.k_warps) ring.fetch(next, next < end, to);
    if (!tabled) {
      for (int i = static_cast<int>(threadIdx.x); i < kTableEntries<kBits> * 32; i += blockDim.x)
        reinterpret_cast<uint32_t*>(shared)[i] =
            table_entry<kBits, kType>(task.w, i / 32, task.level_factor);
      tabled = true;
    }

    float acc[kTiles][4] = {};
    int chunk = begin + k_warp;
    for (int slab = begin; slab < end; slab += plan.slab_chunks) {
      const int slab_end = min(slab + plan.slab_chunks, end);
      const Slab columns{int64_t{slab} * kSegments, (slab_end - slab) * kSegments};
      __syncthreads();  // all warps are done with what lay there
      stage_x<kInterleaved<kBits, kDecoding>>(task, columns, shared);
      stage_parameters<kBatch<kTiles>>(task, values, row, columns, shared);
      __syncthreads();
      if (shifted) {
        sum_x<kType, kTiles>(task, columns, shared);
        __syncthreads();
      }
      for (; chunk < slab_end; chunk += plan.k_warps, next += plan.k_warps) {
        wait_for_copies<kStages - 2>();
        __syncwarp();  // for everyone's copies, and everyone is done with the stage before
        ring.fetch(next, next < end, to);
        const int segment = (chunk - slab) * kSegments;
        multiply_chunk<kBits, kType, kDecoding, kTiles>(ring.stage(from), places, segment, shared,
                                                        acc);
        if (shifted) add_shifts<kSegments>(places, segment, acc);
        from = from + 1 == kStages ? 0 : from + 1;
        to = to + 1 == kStages ? 0 : to + 1;
      }
    }

    wait_for_copies<0>();
    __syncthreads();
    auto* sums = reinterpret_cast<float*>(shared + kTableBytes<kBits>);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * kMmaColumns + accumulator_column(lane, i);
        sums[(warp * kTiles * kMmaColumns + column) * kMmaRows + accumulator_row(lane, i)] =
            acc[n][i];
      }
    }
    __syncthreads();
    store_tile<kType, kTiles>(task, row, slice, sums);
    __syncthreads();  // before the next tile's chunks arrive there
  }
}

}  // namespace bitfold::cuda
