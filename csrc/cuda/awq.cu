#include "cuda/awq.h"

#include "cuda/places.cuh"
#include "cuda/rounder.cuh"
#include "cuda/source.cuh"

namespace bitfold::cuda {
namespace {

// ---- clipping

// A thread for a row, whose neighbours' weights lie beside its own.
__global__ void __launch_bounds__(kThreads)
    propose(const RoundingMatrix w, const __grid_constant__ DeviceEncoding encoding,
            const StoredRounding rounding, const int8_t* exponent, const ClipGroup group) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= group.rows) return;
  const int e = exponent ? *exponent : 0;
  const int64_t row = group.first_row + i, at = group.group * w.stride + row;
  const int64_t begin = group.group * w.group_size;
  const int64_t end = min(w.cols, begin + w.group_size);
  float low = w.weights[begin * w.stride + row], high = low;
  for (int64_t col = begin + 1; col < end; ++col) {
    const float v = w.weights[col * w.stride + row];
    low = lesser(v, low);
    high = greater(v, high);
  }
  const float largest = greater(fabsf(low), fabsf(high));
  for (int c = 0; c < kClipCandidates; ++c) {
    ScaleAndZero choice{w.scale[at], w.zero[at]};
    if (c > 0) {
      const float limit = (1.0f - static_cast<float>(c) / 20.0f) * largest;
      choice = choose_scale(encoding.bits, encoding.zero, encoding.book, greater(low, -limit),
                            lesser(high, limit), 1.0f, 1.0f);
    }
    rounding.apply(e, &choice.scale, &choice.zero);
    group.scale[c * group.rows + i] = choice.scale;
    group.zero[c * group.rows + i] = choice.zero;
    group.loss[c * group.rows + i] = 0.0;
  }
}

template <bool kBook>
__global__ void __launch_bounds__(kThreads, kThreeBlocks)
    round_candidates(const RoundingMatrix w, const __grid_constant__ DeviceEncoding encoding,
                     const ClipGroup group, int64_t low, float* __restrict__ errors,
                     const RowPlan plan) {
  __shared__ Bin bins[kBins];
  __shared__ float levels[kMaxLevels];
  const Rounder<kBook> rounder = make_rounder<kBook>(encoding, bins, levels);
  each_place(plan, [&](int64_t j, int64_t i) {
    const int64_t at = (low + j) * w.stride + group.first_row + i;
    const float v = w.weights[at];
    const bool exact = w.exact && w.exact[at];
    for (int c = 0; c < kClipCandidates; ++c) {
      const float scale = group.scale[c * group.rows + i];
      float unit;
      rounder.round(v, inverse_scale(scale), kBook ? 0.0f : group.zero[c * group.rows + i], &unit);
      errors[(j * kClipCandidates + c) * group.rows + i] = exact ? 0.0f : v - unit * scale;
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    add_candidates(const ClipGroup group, int64_t columns, const float* __restrict__ errors,
                   const float* __restrict__ products) {
  const int64_t count = kClipCandidates * group.rows;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    double sum = 0.0;
    for (int64_t j = 0; j < columns; ++j)
      sum = sum + static_cast<double>(errors[j * count + i]) * products[j * count + i];
    group.loss[i] += sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    take(const RoundingMatrix w, const ClipGroup group, ClipSums* __restrict__ sums) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= group.rows) return;
  const double before = group.loss[i];
  double after = before;
  int best = 0;
  for (int c = 1; c < kClipCandidates; ++c) {
    const double loss = group.loss[c * group.rows + i];
    if (loss < after) {
      after = loss;
      best = c;
    }
  }
  const int64_t row = group.first_row + i, at = group.group * w.stride + row;
  w.scale[at] = group.scale[best * group.rows + i];
  w.zero[at] = group.zero[best * group.rows + i];
  sums[row].clipped += best > 0 ? 1.0 : 0.0;
  sums[row].before += before;
  sums[row].after += after;
}

// ---- scaling

// A warp for a group in kShareRows rows, one after the other: partial [blocks of rows, cols].
__global__ void __launch_bounds__(kThreads)
    share_rows(const MatrixView w, int64_t group_size, float* __restrict__ partial) {
  const int lane = threadIdx.x % 32;
  const int64_t groups = (w.cols + group_size - 1) / group_size;
  const int64_t count = groups * share_blocks(w.rows);
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; i < count;
       i += int64_t{gridDim.x} * (kThreads / 32)) {
    const int64_t block = i / groups, begin = (i - block * groups) * group_size;
    const int64_t end = min(w.cols, begin + group_size);
    const int64_t last = min(w.rows, (block + 1) * kShareRows);
    float* const sum = partial + block * w.cols;
    for (int64_t col = begin + lane; col < end; col += 32) sum[col] = 0.0f;
    for (int64_t row = block * kShareRows; row < last; ++row) {
      float largest = 0.0f;
      for (int64_t col = begin + lane; col < end; col += 32)
        largest = greater(fabsf(load_weight(w, row, col)), largest);
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        largest = greater(__shfl_xor_sync(0xffffffffu, largest, step), largest);
      const float inverse = 1.0f / greater(largest, 1e-30f);
      for (int64_t col = begin + lane; col < end; col += 32)
        sum[col] = sum[col] + fabsf(load_weight(w, row, col)) * inverse;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_blocks(const float* __restrict__ partial, int64_t blocks, int64_t cols,
               double* __restrict__ shares) {
  for (int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x; col < cols;
       col += int64_t{gridDim.x} * kThreads) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum = sum + static_cast<double>(partial[b * cols + col]);
    shares[col] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    copy_picked(const MatrixView w, float* __restrict__ out, const RowPlan plan) {
  const int64_t steps = plan.rows > 1 ? plan.rows - 1 : 1;
  each_place(plan, [&](int64_t i, int64_t col) {
    out[i * plan.units + col] = load_weight(w, i * (w.rows - 1) / steps, col);
  });
}

__device__ inline float factor_of(const int64_t* channel, const float* by, int64_t col) {
  return channel[col] < 0 ? 1.0f : by[channel[col]];
}

__global__ void __launch_bounds__(kThreads)
    scale_places(const float* __restrict__ in, const int64_t* __restrict__ channel,
                 const float* __restrict__ by, float* __restrict__ out, const RowPlan plan) {
  each_place(plan, [&](int64_t row, int64_t col) {
    out[row * plan.units + col] = in[row * plan.units + col] * factor_of(channel, by, col);
  });
}

__global__ void __launch_bounds__(kThreads)
    unscale_places(const float* __restrict__ weight, const int64_t* __restrict__ channel,
                   const float* __restrict__ by, float* __restrict__ errors, const RowPlan plan) {
  each_place(plan, [&](int64_t row, int64_t col) {
    float& error = errors[row * plan.units + col];
    error = error * (1.0f / factor_of(channel, by, col)) - weight[row * plan.units + col];
  });
}

// A warp for a row.
__global__ void __launch_bounds__(kThreads)
    dot_rows(const float* __restrict__ errors, int64_t rows, int64_t cols,
             const float* __restrict__ products, int64_t width, double* __restrict__ sums) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; row < rows;
       row += int64_t{gridDim.x} * (kThreads / 32)) {
    double sum = 0.0;
    for (int64_t col = lane; col < width; col += 32)
      sum = sum + static_cast<double>(errors[row * cols + col]) * products[row * width + col];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum = sum + __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) sums[row] += sum;
  }
}

Launch threads(int64_t count) {
  return blocks(static_cast<uint32_t>((count + kThreads - 1) / kThreads));
}

}  // namespace

Status propose_clips(const RoundingMatrix& w, const DeviceEncoding& encoding,
                     const StoredRounding& rounding, const int8_t* exponent, const ClipGroup& group,
                     cudaStream_t stream) {
  return run("propose", propose, threads(group.rows), 0, stream, w, encoding, rounding, exponent,
             group);
}

Status round_clips(const RoundingMatrix& w, const DeviceEncoding& encoding, const ClipGroup& group,
                   int64_t low, int64_t columns, float* errors, cudaStream_t stream) {
  const auto kernel = encoding.book ? round_candidates<true> : round_candidates<false>;
  return run_places("round_candidates", kernel, columns, group.rows, stream, w, encoding, group,
                    low, errors);
}

Status add_clip_losses(const ClipGroup& group, int64_t columns, const float* errors,
                       const float* products, cudaStream_t stream) {
  return run("add_candidates", add_candidates, threads(kClipCandidates * group.rows), 0, stream,
             group, columns, errors, products);
}

Status take_clips(const RoundingMatrix& w, const ClipGroup& group, ClipSums* sums,
                  cudaStream_t stream) {
  return run("take", take, threads(group.rows), 0, stream, w, group, sums);
}

Status sum_shares(const MatrixView& w, int64_t group_size, float* partial, double* shares,
                  cudaStream_t stream) {
  const int64_t groups = (w.cols + group_size - 1) / group_size, blocks = share_blocks(w.rows);
  Launch launch;
  if (Status status = plan_items(groups * blocks * 32, &launch); !status.ok()) return status;
  if (Status status = run("share_rows", share_rows, launch, 0, stream, w, group_size, partial);
      !status.ok())
    return status;
  if (Status status = plan_items(w.cols, &launch); !status.ok()) return status;
  return run("sum_blocks", sum_blocks, launch, 0, stream, partial, blocks, w.cols, shares);
}

Status pick_rows(const MatrixView& w, int64_t count, float* out, cudaStream_t stream) {
  return run_places("copy_picked", copy_picked, count, w.cols, stream, w, out);
}

Status scale_columns(const float* in, int64_t rows, int64_t cols, const int64_t* channel,
                     const float* by, float* out, cudaStream_t stream) {
  return run_places("scale_places", scale_places, rows, cols, stream, in, channel, by, out);
}

Status unscale_errors(const float* weight, int64_t rows, int64_t cols, const int64_t* channel,
                      const float* by, float* errors, cudaStream_t stream) {
  return run_places("unscale_places", unscale_places, rows, cols, stream, weight, channel, by,
                    errors);
}

Status add_dots(const float* errors, int64_t rows, int64_t cols, const float* products,
                int64_t width, double* sums, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(rows * 32, &launch); !status.ok()) return status;
  return run("dot_rows", dot_rows, launch, 0, stream, errors, rows, cols, products, width, sums);
}

}  // namespace bitfold::cuda
