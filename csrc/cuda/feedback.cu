// Codes column by column with error feedback, 128 columns to a launch (cpu/kernel_table.h tells the
// arithmetic). Four lanes of a warp share a row: of 32 columns at a time each holds eight in
// registers, every fourth one. The lane that owns a column rounds it and hands its error to the
// other three; what the columns before the 32 did is added first. No two rows ever wait for each
// other but where the coefficients of the next 32 columns are fetched.
#include "cuda/places.cuh"
#include "cuda/rounder.cuh"
#include "cuda/rounding.h"

namespace bitfold::cuda {
namespace {

constexpr int kRowLanes = 4;               // of a row
constexpr int kBlockRows = 32;             // of a block
constexpr int kAtOnce = 32;                // columns
constexpr int kOwn = kAtOnce / kRowLanes;  // of a lane
constexpr int kBlockThreads = kBlockRows * kRowLanes;

// Coefficients and errors of a block.
struct Shared {
  // What the error of column k adds to column j of the 32, those of a lane side by side.
  alignas(16) float coefficient[kBlockColumns][kAtOnce];
  float passed[kBlockColumns][kBlockRows];
  float factor[kAtOnce], cost[kAtOnce];
  int32_t column[kAtOnce];
};

__device__ inline void fetch(const FeedbackBlock& block, const ColumnPlaces& places, int64_t cols,
                             int first, int n, Shared* shared) {
  for (int i = threadIdx.x; i < (first + n) * kAtOnce; i += kBlockThreads) {
    const int k = i / kAtOnce, j = i % kAtOnce;
    shared->coefficient[k][j % kRowLanes * kOwn + j / kRowLanes] =
        j < n ? block.matrix[(block.high - 1 - k) * cols + block.high - 1 - first - j] : 0.0f;
  }
  if (static_cast<int>(threadIdx.x) < n) {
    const int64_t a = block.high - 1 - first - threadIdx.x;
    const float own = block.matrix[a * cols + a];
    const int32_t column = places.column[a];
    shared->factor[threadIdx.x] = 1.0f / own;
    shared->cost[threadIdx.x] = places.dead[column] ? 0.0f : block.again ? own : own * own;
    shared->column[threadIdx.x] = column;
  }
}

// The eight coefficients of a lane.
__device__ inline void load_eight(const float* from, float* to) {
  const float4 low = *reinterpret_cast<const float4*>(from);
  const float4 high = *reinterpret_cast<const float4*>(from + 4);
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

template <bool kBook, bool kAgain>
__global__ void __launch_bounds__(kBlockThreads)
    feed_back_columns(const RoundingMatrix w, const __grid_constant__ DeviceEncoding encoding,
                      const ColumnPlaces places, const FeedbackBlock block) {
  static_assert(kOwn == 8);
  __shared__ Shared shared;
  __shared__ Bin bins[kBins];
  __shared__ float levels[kMaxLevels];
  const Rounder<kBook> rounder = make_rounder<kBook>(encoding, bins, levels);
  const int lane = threadIdx.x % 32, own = lane / (32 / kRowLanes);
  const int in_block = threadIdx.x / 32 * (32 / kRowLanes) + lane % (32 / kRowLanes);
  const int64_t row = int64_t{blockIdx.x} * kBlockRows + in_block;
  const bool inside = row < w.rows;
  const int64_t at_row = inside ? row : w.rows - 1;  // others follow the last one and store nothing
  float loss = 0.0f;

  for (int first = 0; first < block.count; first += kAtOnce) {
    const int n = min(kAtOnce, block.count - first);
    __syncthreads();
    fetch(block, places, w.cols, first, n, &shared);
    __syncthreads();
    float sum[kOwn], weight[kOwn], scale[kOwn], inverse[kOwn], zero[kOwn], old_error[kOwn];
    unsigned old_code[kOwn];
    bool exact[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int j = min(i * kRowLanes + own, n - 1);
      const int64_t column = shared.column[j], of_weight = column * w.stride + at_row;
      const int64_t of_group = column / w.group_size * w.stride + at_row;
      const int64_t back = first + j;
      sum[i] = block.correction ? block.correction[at_row - back * w.stride] : 0.0f;
      weight[i] = w.weights[of_weight];
      scale[i] = w.scale[of_group];
      inverse[i] = inverse_scale(scale[i]);
      zero[i] = kBook ? 0.0f : w.zero[of_group];
      exact[i] = w.exact && w.exact[of_weight];
      if constexpr (kAgain) {
        old_error[i] = block.error[(block.high - 1 - back) * w.stride + at_row];
        old_code[i] = w.codes[of_weight];
      }
    }
    for (int k = 0; k < first; ++k) {
      const float passed = shared.passed[k][in_block];
      float coefficient[kOwn];
      load_eight(&shared.coefficient[k][own * kOwn], coefficient);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum[i] = fmaf(passed, coefficient[i], sum[i]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j >= n) break;
      const int i = j / kRowLanes, owner = j % kRowLanes;
      float c = sum[i] * shared.factor[j];
      if constexpr (kAgain) c = c - old_error[i];
      float unit;
      unsigned code = rounder.round(weight[i] + c, inverse[i], zero[i], &unit);
      float error = exact[i] ? 0.0f : weight[i] - unit * scale[i];
      float off = c + error, square = off * off, change = error;
      if constexpr (kAgain) {
        const float off_of_old = c + old_error[i];
        if (!(fabsf(off_of_old) > fabsf(off))) {
          error = old_error[i];
          code = old_code[i];
          off = off_of_old;
        }
        square = off * off - off_of_old * off_of_old;
        change = error - old_error[i];
      }
      const float passed =
          __shfl_sync(0xffffffffu, change, lane % (32 / kRowLanes) + owner * (32 / kRowLanes));
      float coefficient[kOwn];
      load_eight(&shared.coefficient[first + j][own * kOwn], coefficient);
#pragma unroll
      for (int later = i; later < kOwn; ++later)
        sum[later] = fmaf(passed, coefficient[later], sum[later]);
      if (own == owner) {
        const int64_t back = first + j;
        shared.passed[back][in_block] = change;
        loss = fmaf(shared.cost[j], square, loss);
        if (inside) {
          block.error[(block.high - 1 - back) * w.stride + row] = error;
          w.codes[shared.column[j] * w.stride + row] = static_cast<uint8_t>(code);
          if constexpr (kAgain) block.change[row - back * w.stride] = change;
        }
      }
    }
  }
#pragma unroll
  for (int step = 32 / kRowLanes; step < 32; step *= 2)
    loss = loss + __shfl_xor_sync(0xffffffffu, loss, step);
  if (inside && own == 0) block.loss[row] += static_cast<double>(loss);
}

__global__ void __launch_bounds__(kThreads)
    group_values(const RoundingMatrix w, const ColumnPlaces places,
                 const float* __restrict__ matrix, int64_t low,
                 const float* __restrict__ correction, float* __restrict__ values,
                 const RowPlan plan) {
  each_place(plan, [&](int64_t j, int64_t row) {
    const int64_t a = low + j, column = places.column[a], at = column * w.stride + row;
    const float factor = 1.0f / matrix[a * w.cols + a];
    values[column % w.group_size * w.stride + row] =
        w.exact && w.exact[at] ? 0.0f : fmaf(factor, correction[j * w.stride + row], w.weights[at]);
  });
}

}  // namespace

Status feed_back(const RoundingMatrix& w, const DeviceEncoding& encoding,
                 const ColumnPlaces& places, const FeedbackBlock& block, cudaStream_t stream) {
  const auto kernel =
      encoding.book
          ? (block.again ? feed_back_columns<true, true> : feed_back_columns<true, false>)
          : (block.again ? feed_back_columns<false, true> : feed_back_columns<false, false>);
  const Launch launch{static_cast<uint32_t>((w.rows + kBlockRows - 1) / kBlockRows), 1,
                      kBlockThreads, 1};
  return run("feed_back_columns", kernel, launch, 0, stream, w, encoding, places, block);
}

Status begin_group(const RoundingMatrix& w, const ColumnPlaces& places, const float* matrix,
                   int64_t low, int64_t high, const float* correction, float* values,
                   cudaStream_t stream) {
  return run_places("group_values", group_values, high - low, w.rows, stream, w, places, matrix,
                    low, correction, values);
}

}  // namespace bitfold::cuda
