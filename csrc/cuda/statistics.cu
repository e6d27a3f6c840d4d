#include "cuda/statistics.h"

#include <type_traits>

#include "cuda/places.cuh"
#include "cuda/source.cuh"

namespace bitfold::cuda {
namespace {

// NaN and infinity times zero are NaN, and stay.
template <class Load>
__device__ inline void find_first(const RowPlan& plan, const Load& load,
                                  unsigned long long* first) {
  unsigned long long found = kNone;
  each_place(plan, [&](int64_t row, int64_t col) {
    if (load(row, col) * 0 == 0) return;
    found = min(found, static_cast<unsigned long long>(row * plan.units + col));
  });
  if (found != kNone) atomicMin(first, found);
}

__global__ void __launch_bounds__(kThreads)
    find_in_matrix(const MatrixView w, unsigned long long* first, const RowPlan plan) {
  find_first(
      plan, [&](int64_t row, int64_t col) { return load_weight(w, row, col); }, first);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    find_in_mean(const T* __restrict__ mean, unsigned long long* first, const RowPlan plan) {
  find_first(
      plan, [&](int64_t row, int64_t col) { return mean[row * plan.units + col]; }, first);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    copy_diagonal(const T* __restrict__ mean, int64_t n, double* __restrict__ diagonal) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads)
    diagonal[i] = static_cast<double>(mean[i * n + i]);
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads, kFourBlocks)
    permute(const From* __restrict__ mean, const int32_t* __restrict__ column,
            const uint8_t* __restrict__ dead, double added, To* __restrict__ out,
            const RowPlan plan) {
  each_place(plan, [&](int64_t a, int64_t b) {
    const int64_t i = column[a];
    const From value = mean[i * plan.units + column[b]];
    const double own = dead[i] ? 1.0 : static_cast<double>(value);
    out[a * plan.units + b] = a == b ? static_cast<To>(own + added) : static_cast<To>(value);
  });
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    convert(const From* __restrict__ from, int64_t n, To* __restrict__ to) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads)
    to[i] = static_cast<To>(from[i]);
}

template <class From, class To>
Status run_convert(const From* from, int64_t n, To* to, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(n, &launch); !status.ok()) return status;
  return run("convert", convert<From, To>, launch, 0, stream, from, n, to);
}

// A warp for a row.
__global__ void __launch_bounds__(kThreads)
    classify(const MatrixView x, const MatrixView target, bool has_target,
             const uint8_t* __restrict__ mask, uint8_t* __restrict__ kinds, RowCounts* counts) {
  const int lane = threadIdx.x % 32;
  unsigned long long counted = 0, non_finite = 0;
  for (int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; row < x.rows;
       row += int64_t{gridDim.x} * (kThreads / 32)) {
    RowKind kind = RowKind::kMasked;
    if (!mask || mask[row]) {
      float poison = 0.0f;
      for (int64_t col = lane; col < x.cols; col += 32) {
        poison = poison + load_weight(x, row, col) * 0.0f;
        if (has_target) poison = poison + load_weight(target, row, col) * 0.0f;
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        poison = poison + __shfl_xor_sync(0xffffffffu, poison, step);
      kind = poison == 0.0f ? RowKind::kCounted : RowKind::kNonFinite;
    }
    counted += kind == RowKind::kCounted;
    non_finite += kind == RowKind::kNonFinite;
    if (lane == 0) kinds[row] = static_cast<uint8_t>(kind);
  }
  if (lane != 0) return;
  if (counted > 0) atomicAdd(&counts->counted, counted);
  if (non_finite > 0) atomicAdd(&counts->non_finite, non_finite);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    copy_counted(const MatrixView x, const MatrixView target, bool has_target,
                 const uint8_t* __restrict__ kinds, int64_t first, T* __restrict__ out,
                 const RowPlan plan) {
  each_place(plan, [&](int64_t i, int64_t col) {
    const int64_t row = first + i;
    T value = 0;
    if (kinds[row] == static_cast<uint8_t>(RowKind::kCounted)) {
      value = static_cast<T>(load_weight(x, row, col));
      if (has_target) value = static_cast<T>(load_weight(target, row, col)) - value;
    }
    out[i * plan.units + col] = value;
  });
}

// A block for a tile on or above the diagonal, which is read below it.
template <class T>
__global__ void __launch_bounds__(kThreads) mirror_tiles(T* mean, int64_t n) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t tiles = tiles_across(n);
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  for (int64_t at = blockIdx.x; at < tiles * tiles; at += gridDim.x) {
    const int64_t row = at / tiles * kTile, col = at % tiles * kTile;
    if (col < row) continue;
    for (int i = y; i < kTile; i += kTileRows)
      if (col + i < n && row + x < n) tile[i][x] = mean[(col + i) * n + row + x];
    __syncthreads();
    for (int i = y; i < kTile; i += kTileRows)
      if (row + i < col + x && col + x < n) mean[(row + i) * n + col + x] = tile[x][i];
    __syncthreads();
  }
}

// job(data) with the pointer in its own type.
template <class Job>
Status with_data(const MeanView& mean, const Job& job) {
  return mean.fp64 ? job(static_cast<const double*>(mean.data))
                   : job(static_cast<const float*>(mean.data));
}

}  // namespace

Status find_non_finite(const MatrixView& w, unsigned long long* first, cudaStream_t stream) {
  return run_places("find_in_matrix", find_in_matrix, w.rows, w.cols, stream, w, first);
}

Status find_non_finite(const MeanView& mean, unsigned long long* first, cudaStream_t stream) {
  return with_data(mean, [&](const auto* data) {
    using T = std::remove_cvref_t<decltype(*data)>;
    return run_places("find_in_mean", find_in_mean<T>, mean.n, mean.n, stream, data, first);
  });
}

Status read_diagonal(const MeanView& mean, double* diagonal, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(mean.n, &launch); !status.ok()) return status;
  return with_data(mean, [&](const auto* data) {
    using T = std::remove_cvref_t<decltype(*data)>;
    return run("copy_diagonal", copy_diagonal<T>, launch, 0, stream, data, mean.n, diagonal);
  });
}

Status arrange(const MeanView& mean, const int32_t* column, const uint8_t* dead, double added,
               bool out_fp64, void* out, cudaStream_t stream) {
  const auto to = [&](const auto* from, auto* result) {
    using From = std::remove_cvref_t<decltype(*from)>;
    using To = std::remove_cvref_t<decltype(*result)>;
    return run_places("permute", permute<From, To>, mean.n, mean.n, stream, from, column, dead,
                      added, result);
  };
  return with_data(mean, [&](const auto* from) {
    return out_fp64 ? to(from, static_cast<double*>(out)) : to(from, static_cast<float*>(out));
  });
}

Status narrow(const double* from, int64_t n, float* to, cudaStream_t stream) {
  return run_convert(from, n, to, stream);
}

Status widen(const float* from, int64_t n, double* to, cudaStream_t stream) {
  return run_convert(from, n, to, stream);
}

Status look_at_rows(const MatrixView& x, const MatrixView* target, const uint8_t* mask,
                    uint8_t* kinds, RowCounts* counts, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(x.rows * 32, &launch); !status.ok()) return status;
  return run("classify", classify, launch, 0, stream, x, target ? *target : x, target != nullptr,
             mask, kinds, counts);
}

Status copy_rows(const MatrixView& x, const MatrixView* target, const uint8_t* kinds, int64_t first,
                 int64_t count, bool out_fp64, void* out, cudaStream_t stream) {
  const MatrixView& other = target ? *target : x;
  const bool has_target = target != nullptr;
  if (out_fp64) {
    return run_places("copy_counted", copy_counted<double>, count, x.cols, stream, x, other,
                      has_target, kinds, first, static_cast<double*>(out));
  }
  return run_places("copy_counted", copy_counted<float>, count, x.cols, stream, x, other,
                    has_target, kinds, first, static_cast<float*>(out));
}

Status mirror(const MeanView& mean, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_tiles(mean.n, mean.n, &launch); !status.ok()) return status;
  return with_data(mean, [&](const auto* data) {
    using T = std::remove_cvref_t<decltype(*data)>;
    return run("mirror_tiles", mirror_tiles<T>, launch, 0, stream, const_cast<T*>(data), mean.n);
  });
}

}  // namespace bitfold::cuda
