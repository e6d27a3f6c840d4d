#include "cuda/book.cuh"
#include "cuda/quantize.h"
#include "cuda/search.h"
#include "cuda/source.cuh"
#include "cuda/spans.cuh"

namespace bitfold::cuda {
namespace {

// What scales are chosen for. kWeighted: as `counts` has it.
template <bool kWeighted>
struct Weights {
  const MatrixView& w;
  const Counts& counts;

  __device__ bool is_exact(int64_t row, int64_t col) const {
    return counts.exact && counts.exact[row * counts.exact_stride + col];
  }
  __device__ float weight(int64_t row, int64_t col) const {
    if constexpr (kWeighted) {
      if (counts.dead[col] || is_exact(row, col)) return 0.0f;
    }
    return load_weight(w, row, col);
  }
  __device__ float importance(int64_t row, int64_t col) const {
    return is_exact(row, col) ? 0.0f : counts.importance[col];
  }
};

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

template <bool kWeighted>
__device__ inline Extremes extremes_of(const Weights<kWeighted>& w, const SpanPlace& at, int lane) {
  Extremes seen(at.size > 0 ? w.weight(at.row, at.first) : 0.0f);
  for (int64_t j = lane; j < at.size; j += kLanes) seen.add(w.weight(at.row, at.first + j));
  seen.meet_lanes();
  return seen;
}

__device__ inline ScaleAndZero whole_range(const DeviceEncoding& e, const Extremes& seen) {
  ScaleAndZero chosen = choose_scale(e.bits, e.zero, e.book, seen.low, seen.high, 1.0f, 1.0f);
  if (!(seen.poison == 0.0f)) chosen.scale = __int_as_float(0x7fc00000);
  return chosen;
}

template <bool kWeighted>
__global__ void __launch_bounds__(kThreads)
    round_spans(const MatrixView w, const Spans spans, const Counts counts,
                const __grid_constant__ DeviceEncoding encoding, float* __restrict__ scale,
                float* __restrict__ zero) {
  const Weights<kWeighted> source{w, counts};
  each_span(spans.count(), [&](int64_t span, int lane) {
    const Extremes seen = extremes_of(source, place_of(spans, w.cols, span), lane);
    if (lane != 0 || span >= spans.count()) return;
    const ScaleAndZero chosen = whole_range(encoding, seen);
    scale[span] = chosen.scale;
    zero[span] = chosen.zero;
  });
}

template <bool kWeighted>
__global__ void __launch_bounds__(kThreads)
    extremes_of_rows(const MatrixView w, const Counts counts, float* __restrict__ low,
                     float* __restrict__ high) {
  const Weights<kWeighted> source{w, counts};
  const Spans rows{1, w.cols, w.rows};
  each_span(w.rows, [&](int64_t row, int lane) {
    const Extremes seen = extremes_of(source, place_of(rows, w.cols, row), lane);
    if (lane != 0 || row >= w.rows) return;
    low[row] = seen.poison == 0.0f ? seen.low : seen.poison;
    high[row] = seen.high;
  });
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
template <bool kBook, bool kWeighted>
struct Probe {
  const Weights<kWeighted>& w;
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
      const float v = w.weight(at.row, at.first + j);
      const float off = v - unit(v, inverse, choice.zero) * choice.scale;
      if constexpr (kWeighted) {
        sum = sum + off * off * w.importance(at.row, at.first + j);
      } else {
        sum = sum + off * off;
      }
    }
    sum = add_lanes(sum);
    return is_possible(choice) ? sum : __int_as_float(0x7f800000);
  }
  __device__ FitSums fit(ScaleAndZero choice) const {
    const float inverse = inverse_scale(choice.scale);
    FitSums sums{};
    for (int64_t j = lane; j < at.size; j += kLanes) {
      const float v = w.weight(at.row, at.first + j);
      const float d = unit(v, inverse, choice.zero);
      const float off = v - d * choice.scale;
      float of_v = v, of_d = d, of_off = off;
      if constexpr (kWeighted) {
        const float h = w.importance(at.row, at.first + j);
        of_v = v * h;
        of_d = d * h;
        of_off = off * h;
      }
      sums.error = sums.error + off * of_off;
      sums.wd = sums.wd + v * of_d;
      sums.dd = sums.dd + d * of_d;
      sums.w = sums.w + of_v;
      sums.d = sums.d + of_d;
    }
    return {add_lanes(sums.error), add_lanes(sums.wd), add_lanes(sums.dd), add_lanes(sums.w),
            add_lanes(sums.d)};
  }
  // What the weights count together; wanted only where there are real zero points.
  __device__ double total(Zero zero_kind) const {
    if (!kWeighted || zero_kind != Zero::kFloat) return static_cast<double>(at.size);
    double sum = 0.0;
    for (int64_t j = lane; j < at.size; j += kLanes)
      sum = sum + static_cast<double>(w.importance(at.row, at.first + j));
    return add_lanes(sum);
  }
};

template <bool kBook, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kThreeBlocks)
    search_spans(const MatrixView w, const Spans spans, const Counts counts,
                 const __grid_constant__ DeviceEncoding encoding,
                 const __grid_constant__ Shrinks shrinks, float* __restrict__ scale,
                 float* __restrict__ zero) {
  __shared__ Bin bins[kBins];
  __shared__ float levels[kMaxLevels];
  if (kBook) {
    fetch_bins(encoding, bins);
    fetch_levels(encoding, levels);
  }
  const Weights<kWeighted> source{w, counts};
  each_span(spans.count(), [&](int64_t span, int lane) {
    const SpanPlace at = place_of(spans, w.cols, span);
    const Extremes seen = extremes_of(source, at, lane);
    const Probe<kBook, kWeighted> probe{
        source, at, bins, levels, static_cast<float>((1 << encoding.bits) - 1), lane};
    ScaleAndZero chosen =
        search_scale(encoding, shrinks, probe, seen.low, seen.high, probe.total(encoding.zero));
    if (!(seen.poison == 0.0f)) chosen.scale = __int_as_float(0x7fc00000);
    if (lane != 0 || span >= spans.count()) return;
    scale[span] = chosen.scale;
    zero[span] = chosen.zero;
  });
}

}  // namespace

Status round_scales(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                    const Counts& counts, float* scale, float* zero, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(spans.count() * kLanes, &launch); !status.ok()) return status;
  const auto kernel = counts.importance ? round_spans<true> : round_spans<false>;
  return run("round_spans", kernel, launch, 0, stream, w, spans, counts, encoding, scale, zero);
}

Status round_tensor_scale(const MatrixView& w, const DeviceEncoding& encoding, const Counts& counts,
                          float* low, float* high, float* scale, float* zero, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(w.rows * kLanes, &launch); !status.ok()) return status;
  const auto kernel = counts.importance ? extremes_of_rows<true> : extremes_of_rows<false>;
  if (Status status = run("extremes_of_rows", kernel, launch, 0, stream, w, counts, low, high);
      !status.ok())
    return status;
  return run("round_tensor", round_tensor, blocks(1), 0, stream, low, high, w.rows, encoding, scale,
             zero);
}

Status search_scales(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                     const Counts& counts, float* scale, float* zero, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(spans.count() * kLanes, &launch); !status.ok()) return status;
  const bool asymmetric = encoding.zero == Zero::kInt || encoding.zero == Zero::kFloat;
  const Shrinks shrinks = shrinks_for(encoding.bits, asymmetric);
  const auto kernel =
      counts.importance ? (encoding.book ? search_spans<true, true> : search_spans<false, true>)
                        : (encoding.book ? search_spans<true, false> : search_spans<false, false>);
  return run("search_spans", kernel, launch, 0, stream, w, spans, counts, encoding, shrinks, scale,
             zero);
}

}  // namespace bitfold::cuda
