// y = x wᵀ + bias in fp32, for any format, shape and address: a warp for kAnyRows rows of the
// weight and `kColumns` rows of x, lanes along the columns. Right before fast; also what fp32 x
// goes through.
#include "cuda/decode.h"
#include "cuda/device.cuh"
#include "cuda/floats.cuh"
#include "cuda/linear.h"
#include "cuda/linear_plan.h"

namespace bitfold::cuda {
namespace {

struct AnyTask {
  DeviceWeight w;
  AnyPlan plan;
  int64_t m;
  const void* x;     // [m, cols]
  const void* bias;  // [rows] or null
  void* y;           // [m, rows]
};

// acc[column] += weights . x[column] for `N` columns of the weight.
template <FloatType kType, int kColumns, int N>
__device__ inline void multiply(const AnyTask& task, int64_t first_column, int64_t col,
                                const float (*weights)[N], float (*acc)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t at = min(first_column + c, task.m - 1) * task.w.view.cols + col;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float x = read<kType>(task.x, at + j);
#pragma unroll
      for (int r = 0; r < kAnyRows; ++r) acc[r][c] = fmaf(weights[r][j], x, acc[r][c]);
    }
  }
}

template <int kBits, FloatType kType, int kColumns>
__device__ inline void multiply_units(const AnyTask& task, const Values& values, const float* table,
                                      const int64_t (&rows)[kAnyRows], int64_t first_column,
                                      float (*acc)[kColumns]) {
  const PackedView& view = task.w.view;
  for (int64_t col = threadIdx.x % 32 * 8; col < view.cols; col += 32 * 8) {
    float weights[kAnyRows][8];
#pragma unroll
    for (int r = 0; r < kAnyRows; ++r) {
      const UnitCodes codes =
          load_unit<kBits, 8>(view.codes + rows[r] * view.row_bytes, view.plane_bytes, col);
      const UnitParameters p =
          parameters_at(view, values, kDeviceDynamicMap, rows[r], col / view.group_size);
      if (view.family == Family::kInteger) {
        decode_unit<kBits, 8, false>(codes, p, nullptr, weights[r]);
      } else if constexpr (kBits <= 4) {
        decode_unit<kBits, 8, true>(codes, p, table, weights[r]);
      }
    }
    multiply<kType, kColumns, 8>(task, first_column, col, weights, acc);
  }
}

template <int kBits, FloatType kType, int kColumns>
__global__ void __launch_bounds__(kAnyWarps * 32)
    linear_any(const __grid_constant__ AnyTask task, bool units) {
  __shared__ float table[kMaxLevels];
  const PackedView& view = task.w.view;
  const Values values = read_values(task.w.addresses);
  if (threadIdx.x < kMaxLevels) table[threadIdx.x] = task.w.levels[threadIdx.x];
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t columns = blockIdx.y; columns < task.plan.column_blocks; columns += gridDim.y) {
    const int64_t first_column = columns * kColumns;
    for (int64_t block = blockIdx.x; block < task.plan.row_blocks; block += gridDim.x) {
      const int64_t first_row = (block * kAnyWarps + warp) * kAnyRows;
      if (first_row >= view.rows) continue;
      int64_t rows[kAnyRows];
#pragma unroll
      for (int r = 0; r < kAnyRows; ++r) rows[r] = min(first_row + r, view.rows - 1);
      float acc[kAnyRows][kColumns] = {};
      if (units) {
        multiply_units<kBits, kType, kColumns>(task, values, table, rows, first_column, acc);
      } else {
        for (int64_t col = lane; col < view.cols; col += 32) {
          float weights[kAnyRows][1];
#pragma unroll
          for (int r = 0; r < kAnyRows; ++r)
            weights[r][0] = weight_at(task.w, values, kDeviceDynamicMap, rows[r], col);
          multiply<kType, kColumns, 1>(task, first_column, col, weights, acc);
        }
      }
#pragma unroll
      for (int r = 0; r < kAnyRows; ++r) {
        const OutlierRange outliers = outlier_range(view.outliers, rows[r]);
        for (int64_t i = outliers.begin + lane; i < outliers.end; i += 32) {
          const int64_t col = column_of_outlier(view, i);
          if (col < 0) continue;
          const float value = from_half(view.outliers.value[i]) * values.outlier_factor;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const int64_t at = min(first_column + c, task.m - 1) * view.cols + col;
            acc[r][c] = fmaf(value, read<kType>(task.x, at), acc[r][c]);
          }
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float sum = acc[r][c];
#pragma unroll
          for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
          if (lane != 0 || first_row + r >= view.rows || first_column + c >= task.m) continue;
          if (task.bias) sum += read<kType>(task.bias, rows[r]);
          write<kType>(task.y, (first_column + c) * view.rows + rows[r], sum);
        }
      }
    }
  }
}

template <int kBits, FloatType kType>
Status launch_type(const AnyTask& task, cudaStream_t stream) {
  const PackedView& view = task.w.view;
  constexpr uintptr_t kAligned = unit_alignment<kBits, 8>();
  const bool units = view.family != Family::kLearnedCodebook && view.cols % 8 == 0 &&
                     view.row_bytes % kAligned == 0 &&
                     reinterpret_cast<uintptr_t>(view.codes) % kAligned == 0;
  const Launch launch{task.plan.grid_x, task.plan.grid_y, kAnyWarps * 32, 1};
  const auto kernel =
      task.plan.columns == 1 ? linear_any<kBits, kType, 1> : linear_any<kBits, kType, 8>;
  return run("linear_any", kernel, launch, 0, stream, task, units);
}

template <int kBits>
Status launch_bits(const AnyTask& task, FloatType dtype, cudaStream_t stream) {
  return dtype == FloatType::kFloat32   ? launch_type<kBits, FloatType::kFloat32>(task, stream)
         : dtype == FloatType::kFloat16 ? launch_type<kBits, FloatType::kFloat16>(task, stream)
                                        : launch_type<kBits, FloatType::kBFloat16>(task, stream);
}

}  // namespace

Status linear_any(const DeviceWeight& w, const void* x, int64_t m, const void* bias,
                  FloatType dtype, void* y, cudaStream_t stream) {
  if (m == 0) return Status::success();
  const AnyTask task{w, plan_any(m, w.view.rows), m, x, bias, y};
  return w.view.bits == 8   ? launch_bits<8>(task, dtype, stream)
         : w.view.bits == 4 ? launch_bits<4>(task, dtype, stream)
         : w.view.bits == 3 ? launch_bits<3>(task, dtype, stream)
                            : launch_bits<2>(task, dtype, stream);
}

}  // namespace bitfold::cuda
