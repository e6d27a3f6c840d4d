#include "cuda/rounding.h"

#include "cuda/device.cuh"

namespace bitfold::cuda {
namespace {

// The sum over a block, in every thread, always in one order.
__device__ inline double add_block(double v) {
  __shared__ double of_warp[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = v + __shfl_xor_sync(0xffffffffu, v, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  v = of_warp[0];
  for (int i = 1; i < kThreads / 32; ++i) v = v + of_warp[i];
  __syncthreads();
  return v;
}

// A block for a position.
__global__ void __launch_bounds__(kThreads)
    square_positions(const RoundingMatrix w, const ColumnPlaces places,
                     const float* __restrict__ error, double* __restrict__ sums) {
  for (int64_t a = blockIdx.x; a < w.cols; a += gridDim.x) {
    double sum = 0.0;
    if (!places.dead[places.column[a]]) {
      for (int64_t row = threadIdx.x; row < w.rows; row += kThreads) {
        const double e = error[a * w.stride + row];
        sum = sum + e * e;
      }
    }
    sum = add_block(sum);
    if (threadIdx.x == 0) sums[a] = sum;
  }
}

// A thread for a row.
__global__ void __launch_bounds__(kThreads)
    add_products(const RoundingMatrix w, const ColumnPlaces places, int64_t low, int64_t count,
                 const float* __restrict__ error, const float* __restrict__ products,
                 double* __restrict__ loss) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= w.rows) return;
  double sum = 0.0;
  for (int64_t j = 0; j < count; ++j) {
    if (places.dead[places.column[low + j]]) continue;
    sum =
        sum + static_cast<double>(error[(low + j) * w.stride + row]) * products[j * w.stride + row];
  }
  loss[row] += sum;
}

constexpr int kAcross = 8;  // threads to a row

// kThreads / kAcross neighbouring rows to a block; the columns of each are shared out.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_rows(int64_t cols, int64_t count, const ColumnPlaces places,
             const float* __restrict__ errors, const T* __restrict__ products,
             const double* __restrict__ own, RowLoss* __restrict__ sums) {
  constexpr int kRows = kThreads / kAcross;
  __shared__ RowLoss parts[kAcross][kRows];
  const int in_block = threadIdx.x % kRows, part = threadIdx.x / kRows;
  const int64_t row = int64_t{blockIdx.x} * kRows + in_block;
  RowLoss sum{};
  for (int64_t col = part; row < count && col < cols; col += kAcross) {
    if (places.dead[col]) continue;
    const double e = errors[col * count + row], factor = own[places.position[col]];
    sum.loss = sum.loss + e * static_cast<double>(products[col * count + row]);
    sum.predicted = sum.predicted + e * e * factor * factor;
    sum.squares = sum.squares + e * e;
  }
  parts[part][in_block] = sum;
  __syncthreads();
  if (part != 0 || row >= count) return;
  for (int i = 1; i < kAcross; ++i) {
    sum.loss = sum.loss + parts[i][in_block].loss;
    sum.predicted = sum.predicted + parts[i][in_block].predicted;
    sum.squares = sum.squares + parts[i][in_block].squares;
  }
  sums[row] = sum;
}

}  // namespace

Status sum_squares(const RoundingMatrix& w, const ColumnPlaces& places, const float* error,
                   double* sums, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(w.cols * kThreads, &launch); !status.ok()) return status;
  return run("square_positions", square_positions, launch, 0, stream, w, places, error, sums);
}

Status add_losses(const RoundingMatrix& w, const ColumnPlaces& places, int64_t low, int64_t count,
                  const float* error, const float* products, double* loss, cudaStream_t stream) {
  const Launch launch = blocks(static_cast<uint32_t>((w.rows + kThreads - 1) / kThreads));
  return run("add_products", add_products, launch, 0, stream, w, places, low, count, error,
             products, loss);
}

Status sum_losses(int64_t cols, int64_t count, const ColumnPlaces& places, const float* errors,
                  const void* products, bool fp64, const double* own, RowLoss* sums,
                  cudaStream_t stream) {
  const Launch launch = blocks(static_cast<uint32_t>((count * kAcross + kThreads - 1) / kThreads));
  if (fp64) {
    return run("sum_rows", sum_rows<double>, launch, 0, stream, cols, count, places, errors,
               static_cast<const double*>(products), own, sums);
  }
  return run("sum_rows", sum_rows<float>, launch, 0, stream, cols, count, places, errors,
             static_cast<const float*>(products), own, sums);
}

}  // namespace bitfold::cuda
