#include "cuda/device.cuh"
#include "cuda/quantize.h"
#include "cuda/search.h"
#include "cuda/source.cuh"

namespace bitfold::cuda {
namespace {

// Sixteen lanes share a span: lane p takes the weights j with j mod 16 = p, and sums meet i with i
// + 8, then + 4, + 2, + 1, which is the order of the CPU (cpu/kernels/search-inl.h).
constexpr int kLanes = 16;

__device__ inline float add_lanes(float v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    v = v + __shfl_xor_sync(0xffffffffu, v, step, kLanes);
  return v;
}

// Extremes of what a lane has seen. NaN and infinity times zero are NaN, and stay.
struct Extremes {
  float low, high, poison = 0.0f;
  __device__ explicit Extremes(float v) : low(v), high(v) {}
  __device__ void add(float v) {
    low = lesser(v, low);
    high = greater(v, high);
    poison = poison + v * 0.0f;
  }
  __device__ void meet_lanes() {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      low = lesser(__shfl_xor_sync(0xffffffffu, low, step, kLanes), low);
      high = greater(__shfl_xor_sync(0xffffffffu, high, step, kLanes), high);
      poison = poison + __shfl_xor_sync(0xffffffffu, poison, step, kLanes);
    }
  }
};

// Where a span lies; lanes of a warp that has no span left walk an empty one.
struct SpanPlace {
  int64_t row = 0, first = 0, size = 0;
};

__device__ inline SpanPlace place_of(const Spans& spans, int64_t cols, int64_t span) {
  if (span >= spans.count()) return {};
  const int64_t row = span / spans.groups, first = (span - row * spans.groups) * spans.group_size;
  const int64_t rest = cols - first;
  return {row, first, rest < spans.group_size ? rest : spans.group_size};
}

__device__ inline Extremes extremes_of(const MatrixView& w, const SpanPlace& at, int lane) {
  Extremes seen(at.size > 0 ? load_weight(w, at.row, at.first) : 0.0f);
  for (int64_t j = lane; j < at.size; j += kLanes) seen.add(load_weight(w, at.row, at.first + j));
  seen.meet_lanes();
  return seen;
}

__device__ inline ScaleAndZero whole_range(const DeviceEncoding& e, const Extremes& seen) {
  ScaleAndZero chosen = choose_scale(e.bits, e.zero, e.book, seen.low, seen.high, 1.0f, 1.0f);
  if (!(seen.poison == 0.0f)) chosen.scale = __int_as_float(0x7fc00000);
  return chosen;
}

__global__ void __launch_bounds__(kThreads)
    round_spans(const MatrixView w, const Spans spans,
                const __grid_constant__ DeviceEncoding encoding, float* __restrict__ scale,
                float* __restrict__ zero) {
  const int lane = threadIdx.x % kLanes;
  const int64_t count = spans.count(), stride = int64_t{gridDim.x} * kThreads / kLanes;
  // Whole warps walk on together: both of their halves, or neither.
  for (int64_t base = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32 * 2; base < count;
       base += stride) {
    const int64_t span = base + threadIdx.x % 32 / kLanes;
    const Extremes seen = extremes_of(w, place_of(spans, w.cols, span), lane);
    if (lane != 0 || span >= count) continue;
    const ScaleAndZero chosen = whole_range(encoding, seen);
    scale[span] = chosen.scale;
    zero[span] = chosen.zero;
  }
}

__global__ void __launch_bounds__(kThreads)
    extremes_of_rows(const MatrixView w, float* __restrict__ low, float* __restrict__ high) {
  const Spans rows{1, w.cols, w.rows};
  const int lane = threadIdx.x % kLanes;
  for (int64_t base = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32 * 2; base < w.rows;
       base += int64_t{gridDim.x} * kThreads / kLanes) {
    const int64_t row = base + threadIdx.x % 32 / kLanes;
    const Extremes seen = extremes_of(w, place_of(rows, w.cols, row), lane);
    if (lane != 0 || row >= w.rows) continue;
    low[row] = seen.poison == 0.0f ? seen.low : seen.poison;
    high[row] = seen.high;
  }
}

// A block: the extremes of all rows.
__global__ void __launch_bounds__(kThreads)
    round_tensor(const float* __restrict__ low, const float* __restrict__ high, int64_t rows,
                 const __grid_constant__ DeviceEncoding encoding, float* scale, float* zero) {
  __shared__ float lows[kThreads], highs[kThreads], poisons[kThreads];
  Extremes seen(low[0]);
  seen.high = high[0];
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    seen.low = lesser(low[i], seen.low);
    seen.high = greater(high[i], seen.high);
    seen.poison = seen.poison + low[i] * 0.0f;
  }
  lows[threadIdx.x] = seen.low;
  highs[threadIdx.x] = seen.high;
  poisons[threadIdx.x] = seen.poison;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) {
    seen.low = lesser(lows[i], seen.low);
    seen.high = greater(highs[i], seen.high);
    seen.poison = seen.poison + poisons[i];
  }
  const ScaleAndZero chosen = whole_range(encoding, seen);
  *scale = chosen.scale;
  *zero = chosen.zero;
}

// A span as the search sees it: errors and sums of the codes that a choice leads to.
template <bool kBook>
struct Probe {
  const MatrixView& w;
  const SpanPlace& at;
  const Bin* bins;
  const float* levels;
  float top;
  int lane;

  __device__ float unit(float v, float inverse, float zero) const {
    const float scaled = v * inverse;
    if constexpr (kBook) return levels[code_in(bins[bin_of(scaled)], scaled)];
    return grid_code(v, inverse, zero, top) - zero;
  }
  __device__ float error(ScaleAndZero choice) const {
    const float inverse = 1.0f / greater(choice.scale, 1e-38f);
    float sum = 0.0f;
    for (int64_t j = lane; j < at.size; j += kLanes) {
      const float v = load_weight(w, at.row, at.first + j);
      const float off = v - unit(v, inverse, choice.zero) * choice.scale;
      sum = sum + off * off;
    }
    sum = add_lanes(sum);
    return is_possible(choice) ? sum : __int_as_float(0x7f800000);
  }
  __device__ FitSums fit(ScaleAndZero choice) const {
    const float inverse = inverse_scale(choice.scale);
    FitSums sums{};
    for (int64_t j = lane; j < at.size; j += kLanes) {
      const float v = load_weight(w, at.row, at.first + j);
      const float d = unit(v, inverse, choice.zero);
      const float off = v - d * choice.scale;
      sums.error = sums.error + off * off;
      sums.wd = sums.wd + v * d;
      sums.dd = sums.dd + d * d;
      sums.w = sums.w + v;
      sums.d = sums.d + d;
    }
    return {add_lanes(sums.error), add_lanes(sums.wd), add_lanes(sums.dd), add_lanes(sums.w),
            add_lanes(sums.d)};
  }
};

template <bool kBook>
__global__ void __launch_bounds__(kThreads, kThreeBlocks)
    search_spans(const MatrixView w, const Spans spans,
                 const __grid_constant__ DeviceEncoding encoding,
                 const __grid_constant__ Shrinks shrinks, float* __restrict__ scale,
                 float* __restrict__ zero) {
  __shared__ Bin bins[kBins];
  __shared__ float levels[kMaxLevels];
  if (kBook) {
    if (threadIdx.x < kBins) bins[threadIdx.x] = encoding.bins[threadIdx.x];
    if (threadIdx.x < kMaxLevels) levels[threadIdx.x] = encoding.levels[threadIdx.x];
    __syncthreads();
  }
  const int lane = threadIdx.x % kLanes;
  const int64_t count = spans.count();
  for (int64_t base = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32 * 2; base < count;
       base += int64_t{gridDim.x} * kThreads / kLanes) {
    const int64_t span = base + threadIdx.x % 32 / kLanes;
    const SpanPlace at = place_of(spans, w.cols, span);
    const Extremes seen = extremes_of(w, at, lane);
    const Probe<kBook> probe{w,   at, bins, levels, static_cast<float>((1 << encoding.bits) - 1),
                             lane};
    ScaleAndZero chosen = search_scale(encoding, shrinks, probe, seen.low, seen.high, at.size);
    if (!(seen.poison == 0.0f)) chosen.scale = __int_as_float(0x7fc00000);
    if (lane != 0 || span >= count) continue;
    scale[span] = chosen.scale;
    zero[span] = chosen.zero;
  }
}

}  // namespace

Status round_scales(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                    float* scale, float* zero, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(spans.count() * kLanes, &launch); !status.ok()) return status;
  return run("round_spans", round_spans, launch, 0, stream, w, spans, encoding, scale, zero);
}

Status round_tensor_scale(const MatrixView& w, const DeviceEncoding& encoding, float* low,
                          float* high, float* scale, float* zero, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(w.rows * kLanes, &launch); !status.ok()) return status;
  if (Status status = run("extremes_of_rows", extremes_of_rows, launch, 0, stream, w, low, high);
      !status.ok())
    return status;
  return run("round_tensor", round_tensor, blocks(1), 0, stream, low, high, w.rows, encoding, scale,
             zero);
}

Status search_scales(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                     const Shrinks& shrinks, float* scale, float* zero, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(spans.count() * kLanes, &launch); !status.ok()) return status;
  const auto kernel = encoding.book ? search_spans<true> : search_spans<false>;
  return run("search_spans", kernel, launch, 0, stream, w, spans, encoding, shrinks, scale, zero);
}

}  // namespace bitfold::cuda
