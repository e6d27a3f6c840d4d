#include "cuda/linear_mixed.h"

#include "cuda/decode.h"
#include "cuda/device.cuh"
#include "cuda/floats.cuh"

namespace bitfold::cuda {
namespace {

constexpr int kWords = 16;  // of four columns, that a tile is deep
constexpr int kPad = 1;     // so that neighbouring rows of a tile begin in different banks
constexpr int kSide = 16, kMixedThreads = kSide * kSide;  // a block
constexpr int kPerThread = 4;                             // rows of the weight
constexpr int kTileRows = kSide * kPerThread;
constexpr int kTwoBlocks = 2;          // of a multiprocessor: 128 registers a thread
constexpr int64_t kExactCols = 65536;  // 127 * 128 times this is below 2^31

// x as integers: where things lie in scratch.
struct MixedScratch {
  int64_t row_bytes;    // of q: whole words, zero behind the last column
  uint8_t* is_outlier;  // [cols]
  int32_t* list;        // [cols] the outliers, ascending
  int32_t* count;       // [1]
  float* step;          // [m]: x = step * q
  int8_t* q;            // [m, row_bytes], outlier columns zero
};

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t row_bytes_of(int64_t cols) { return (cols + 15) / 16 * 16; }

MixedScratch lay_out(void* scratch, int64_t m, int64_t cols) {
  auto* at = static_cast<char*>(scratch);
  const auto take = [&](int64_t bytes) {
    char* const here = at;
    at += aligned(bytes);
    return here;
  };
  MixedScratch s{};
  s.row_bytes = row_bytes_of(cols);
  s.is_outlier = reinterpret_cast<uint8_t*>(take(cols));
  s.list = reinterpret_cast<int32_t*>(take(4 * cols));
  s.count = reinterpret_cast<int32_t*>(take(4));
  s.step = reinterpret_cast<float*>(take(4 * m));
  s.q = reinterpret_cast<int8_t*>(take(m * s.row_bytes));
  return s;
}

// A thread for a column.
template <FloatType kType>
__global__ void __launch_bounds__(kThreads)
    search_columns(const void* x, int64_t m, int64_t cols, float threshold,
                   uint8_t* __restrict__ is_outlier) {
  for (int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x; col < cols;
       col += int64_t{gridDim.x} * kThreads) {
    bool above = false;  // true for NaN
    for (int64_t i = 0; i < m; ++i)
      above = above || !(fabsf(read<kType>(x, i * cols + col)) <= threshold);
    is_outlier[col] = above;
  }
}

// Some given columns, which travel with the launch, so that it can be recorded in a graph.
constexpr int kGiven = 512;
struct GivenColumns {
  int32_t column[kGiven];
  int count;
};
__global__ void __launch_bounds__(kThreads) clear_columns(uint8_t* is_outlier, int64_t cols) {
  for (int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x; col < cols;
       col += int64_t{gridDim.x} * kThreads)
    is_outlier[col] = 0;
}
__global__ void __launch_bounds__(kThreads)
    mark_columns(const __grid_constant__ GivenColumns given, uint8_t* __restrict__ is_outlier) {
  for (int i = threadIdx.x; i < given.count; i += kThreads) is_outlier[given.column[i]] = 1;
}

// One block: the marked columns in their order.
__global__ void __launch_bounds__(kThreads)
    list_columns(const uint8_t* __restrict__ is_outlier, int64_t cols, int32_t* __restrict__ list,
                 int32_t* count) {
  __shared__ int before[2][kThreads];
  int found = 0;
  for (int64_t first = 0; first < cols; first += kThreads) {
    const int64_t col = first + threadIdx.x;
    const int mine = col < cols && is_outlier[col] ? 1 : 0;
    int from = 0;
    before[0][threadIdx.x] = mine;
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2, from = 1 - from) {
      const int thread = threadIdx.x;
      before[1 - from][thread] =
          before[from][thread] + (thread >= step ? before[from][thread - step] : 0);
      __syncthreads();
    }
    if (mine) list[found + before[from][threadIdx.x] - 1] = static_cast<int32_t>(col);
    found += before[from][kThreads - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) *count = found;
}

// A block for a row of x.
template <FloatType kType>
__global__ void __launch_bounds__(kThreads)
    quantize_rows(const void* x, int64_t m, int64_t cols, const MixedScratch to) {
  __shared__ float largest_of[kThreads / 32];
  for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
    float largest = 0.0f;
    for (int64_t col = threadIdx.x; col < cols; col += kThreads) {
      const float size = to.is_outlier[col] ? 0.0f : fabsf(read<kType>(x, row * cols + col));
      largest = size > largest || !(size == size) ? size : largest;  // NaN stays
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, largest, step);
      largest = other > largest || !(other == other) ? other : largest;
    }
    if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
    __syncthreads();
    for (const float other : largest_of)
      largest = other > largest || !(other == other) ? other : largest;
    __syncthreads();
    const float inverse = 127.0f / largest;
    const bool finite = largest <= 3.402823466e38f,
               counts = finite && inverse < __int_as_float(0x7f800000);
    if (threadIdx.x == 0)
      to.step[row] = !finite ? __int_as_float(0x7fc00000) : counts ? largest / 127.0f : 0.0f;
    for (int64_t col = threadIdx.x; col < to.row_bytes; col += kThreads) {
      const bool zero = !counts || col >= cols || to.is_outlier[col];
      to.q[row * to.row_bytes + col] =
          zero ? int8_t{0} : static_cast<int8_t>(rintf(read<kType>(x, row * cols + col) * inverse));
    }
  }
}

struct MixedTask {
  DeviceWeight w;
  MixedScratch s;
  int64_t m;
  const void* x;     // [m, cols]
  const void* bias;  // [rows] or null
  void* y;           // [m, rows]
};

// Four codes less 128, as int8; zeros behind the last.
__device__ inline uint32_t codes_at(const uint8_t* row, int64_t col, int64_t cols, bool words) {
  if (words && col + 4 <= cols) return *reinterpret_cast<const uint32_t*>(row + col) ^ 0x80808080u;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i)
    if (col + i < cols) word |= static_cast<uint32_t>(row[col + i] ^ 0x80) << (8 * i);
  return word;
}

// kTileRows rows of the weight by kSide * kRows of x, the integers through shared memory.
template <FloatType kType, int kRows>
__global__ void __launch_bounds__(kMixedThreads, kTwoBlocks)
    multiply_mixed(const __grid_constant__ MixedTask task, bool words) {
  constexpr int kTileX = kSide * kRows;
  __shared__ uint32_t codes[kTileRows][kWords + kPad], q[kTileX][kWords + kPad];
  const PackedView& view = task.w.view;
  const int across = threadIdx.x % kSide, down = threadIdx.x / kSide;
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int64_t first_x = int64_t{blockIdx.y} * kTileX;
  const Values values = read_values(task.w.addresses);
  const int64_t count = *task.s.count;

  long long total[kPerThread][kRows] = {};
  for (int64_t begin = 0; begin < view.cols; begin += kExactCols) {
    const int64_t end = min(view.cols, begin + kExactCols);
    int sum[kPerThread][kRows] = {};
    for (int64_t col = begin; col < end; col += 4 * kWords) {
      __syncthreads();
      for (int i = threadIdx.x; i < kTileRows * kWords; i += kMixedThreads) {
        const int64_t row = first_row + i / kWords, at = col + i % kWords * 4;
        codes[i / kWords][i % kWords] =
            row < view.rows && at < end
                ? codes_at(view.codes + row * view.row_bytes, at, end, words)
                : 0u;
      }
      for (int i = threadIdx.x; i < kTileX * kWords; i += kMixedThreads) {
        const int64_t row = first_x + i / kWords, at = col + i % kWords * 4;
        q[i / kWords][i % kWords] =
            row < task.m && at < end
                ? *reinterpret_cast<const uint32_t*>(task.s.q + row * task.s.row_bytes + at)
                : 0u;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        int mine[kRows];
#pragma unroll
        for (int j = 0; j < kRows; ++j) mine[j] = static_cast<int>(q[down + j * kSide][k]);
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          const int four = static_cast<int>(codes[across + i * kSide][k]);
#pragma unroll
          for (int j = 0; j < kRows; ++j) sum[i][j] = __dp4a(four, mine[j], sum[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) total[i][j] += sum[i][j];
    }
  }

#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t row = first_row + across + i * kSide;
    if (row >= view.rows) continue;
    const float scale = scale_at(view, values, kDeviceDynamicMap, row, 0);
    const float bias = task.bias ? read<kType>(task.bias, row) : 0.0f;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t at = first_x + down + j * kSide;
      if (at >= task.m) continue;
      float value = static_cast<float>(total[i][j]) * (task.s.step[at] * scale) + bias;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t col = task.s.list[c];
        const float weight =
            (small_to_float(view.codes[row * view.row_bytes + col]) - 128.0f) * scale;
        value = fmaf(read<kType>(task.x, at * view.cols + col), weight, value);
      }
      write<kType>(task.y, at * view.rows + row, value);
    }
  }
}

Status find_columns(const void* x, int64_t m, int64_t cols, FloatType dtype,
                    const MixedColumns& columns, const MixedScratch& s, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(cols, &launch); !status.ok()) return status;
  if (!columns.fixed) {
    const auto kernel = dtype == FloatType::kFloat32   ? search_columns<FloatType::kFloat32>
                        : dtype == FloatType::kFloat16 ? search_columns<FloatType::kFloat16>
                                                       : search_columns<FloatType::kBFloat16>;
    if (Status status = run("search_columns", kernel, launch, 0, stream, x, m, cols,
                            columns.threshold, s.is_outlier);
        !status.ok())
      return status;
  } else {
    if (Status status = run("clear_columns", clear_columns, launch, 0, stream, s.is_outlier, cols);
        !status.ok())
      return status;
    for (int64_t first = 0; first < columns.count; first += kGiven) {
      GivenColumns given{};
      given.count =
          static_cast<int>(columns.count - first < kGiven ? columns.count - first : kGiven);
      for (int i = 0; i < given.count; ++i)
        given.column[i] = static_cast<int32_t>(columns.columns[first + i]);
      if (Status status =
              run("mark_columns", mark_columns, blocks(1), 0, stream, given, s.is_outlier);
          !status.ok())
        return status;
    }
  }
  return run("list_columns", list_columns, blocks(1), 0, stream, s.is_outlier, cols, s.list,
             s.count);
}

template <FloatType kType>
Status multiply(const MixedTask& task, cudaStream_t stream) {
  const PackedView& view = task.w.view;
  const auto row_blocks = static_cast<uint32_t>(task.m < kMaxGridX ? task.m : kMaxGridX);
  if (Status status = run("quantize_rows", quantize_rows<kType>, blocks(row_blocks), 0, stream,
                          task.x, task.m, view.cols, task.s);
      !status.ok())
    return status;
  const bool words = view.row_bytes % 4 == 0 && reinterpret_cast<uintptr_t>(view.codes) % 4 == 0;
  const bool few = task.m <= kSide;
  const int64_t tile = kSide * (few ? 1 : 4), tiles = (task.m + tile - 1) / tile;
  if (tiles > kMaxGridY) {
    return Status::error(StatusCode::kInvalidArgument,
                         "x has " + std::to_string(task.m) + " rows, at most " +
                             std::to_string(kMaxGridY * tile) + " are possible at once");
  }
  const Launch launch{static_cast<uint32_t>((view.rows + kTileRows - 1) / kTileRows),
                      static_cast<uint32_t>(tiles), kMixedThreads, 1};
  return run("multiply_mixed", few ? multiply_mixed<kType, 1> : multiply_mixed<kType, 4>, launch, 0,
             stream, task, words);
}

}  // namespace

int64_t linear_mixed_scratch_bytes(int64_t m, int64_t cols) {
  return aligned(cols) + aligned(4 * cols) + aligned(4) + aligned(4 * m) +
         aligned(m * row_bytes_of(cols));
}

Status linear_mixed(const DeviceWeight& w, const void* x, int64_t m, const void* bias,
                    FloatType dtype, const MixedColumns& columns, void* scratch, void* y,
                    cudaStream_t stream) {
  if (m == 0 || w.view.rows == 0) return Status::success();
  const MixedScratch s = lay_out(scratch, m, w.view.cols);
  if (Status status = find_columns(x, m, w.view.cols, dtype, columns, s, stream); !status.ok())
    return status;
  const MixedTask task{w, s, m, x, bias, y};
  return dtype == FloatType::kFloat32   ? multiply<FloatType::kFloat32>(task, stream)
         : dtype == FloatType::kFloat16 ? multiply<FloatType::kFloat16>(task, stream)
                                        : multiply<FloatType::kBFloat16>(task, stream);
}

}  // namespace bitfold::cuda
