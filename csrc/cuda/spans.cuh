// Sixteen lanes to a span: lane p takes the weights j with j mod 16 = p, and sums meet i with i +
// 8, then + 4, + 2, + 1, which is the order of the CPU (cpu/kernels/search-inl.h).
#pragma once

#include "cuda/device.cuh"
#include "cuda/quantize.h"

namespace bitfold::cuda {

inline constexpr int kLanes = 16;

template <class T>
__device__ inline T add_lanes(T v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    v = v + __shfl_xor_sync(0xffffffffu, v, step, kLanes);
  return v;
}

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

// body(span, its lane) for the spans of this half of a warp. Whole warps walk on together: both of
// their halves, or neither, so that a span may lie beyond the last.
template <class Body>
__device__ inline void each_span(int64_t count, const Body& body) {
  for (int64_t base = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32 * 2; base < count;
       base += int64_t{gridDim.x} * kThreads / kLanes)
    body(base + threadIdx.x % 32 / kLanes, static_cast<int>(threadIdx.x % kLanes));
}

}  // namespace bitfold::cuda
