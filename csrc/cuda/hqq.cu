#include "cuda/encode.h"
#include "cuda/quantize.h"
#include "cuda/source.cuh"
#include "cuda/spans.cuh"

namespace bitfold::cuda {
namespace {

// Sums of the residuals r of a span, in steps of the grid (cpu/kernel_table.h).
struct Residuals {
  float error, pull;
};

__device__ inline Residuals residuals_of(const MatrixView& w, const SpanPlace& at, int lane,
                                         float top, float inverse, float zero, float p,
                                         float log_beta) {
  Residuals sum{};
  for (int64_t j = lane; j < at.size; j += kLanes) {
    const float place = load_weight(w, at.row, at.first + j) * inverse + zero;
    const float r = place - lesser(greater(rintf(place), 0.0f), top);
    const float size = fabsf(r);
    // min(1, |r|^(p - 2) / beta)
    const float power = (p - 2.0f) * log2f(lesser(greater(size, 1e-30f), 1e30f)) - log_beta;
    sum.error = sum.error + size;
    sum.pull = sum.pull + r * exp2f(lesser(power, 0.0f));
  }
  return {add_lanes(sum.error), add_lanes(sum.pull)};
}

__global__ void __launch_bounds__(kThreads)
    shrink_spans(const MatrixView w, const Spans spans, int bits, const HqqSteps steps,
                 const float* __restrict__ scale, float* __restrict__ zero) {
  const float top = static_cast<float>((1 << bits) - 1);
  each_span(spans.count(), [&](int64_t span, int lane) {
    const SpanPlace at = place_of(spans, w.cols, span);
    const bool inside = at.size > 0;
    const float inverse = inside ? inverse_scale(scale[span]) : 0.0f;
    float wanted = inside ? zero[span] : 0.0f, best = wanted, least = 0.0f, beta = steps.beta;
    bool active = true;  // the other half of the warp may go on: nobody leaves before the end
    for (int step = 0; step < steps.iterations; ++step, beta = beta * steps.kappa) {
      const float stored = from_half(to_half(wanted));
      const Residuals sums = residuals_of(w, at, lane, top, inverse, stored, steps.p, log2f(beta));
      active = active && (step == 0 || sums.error <= least);
      if (!active) continue;
      least = sums.error;
      best = stored;
      wanted = wanted - sums.pull / static_cast<float>(at.size);
      active = fabsf(wanted) <= kFarthestZero;  // false for NaN
      if (!active) wanted = stored;
    }
    if (lane == 0 && inside) zero[span] = best;
  });
}

}  // namespace

Status shrink_zeros(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                    const HqqSteps& steps, const float* scale, float* zero, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(spans.count() * kLanes, &launch); !status.ok()) return status;
  return run("shrink_spans", shrink_spans, launch, 0, stream, w, spans, encoding.bits, steps, scale,
             zero);
}

}  // namespace bitfold::cuda
