#include "solvers/cuda/refit.h"

#include <algorithm>

namespace bitfold {

GpuRefit::GpuRefit(GpuRun* run, const GpuLayer& layer, GpuFeedback* feedback, GpuScales* scales)
    : run_(*run),
      algebra_(run->gpu.algebra),
      layer_(layer),
      w_(layer.w),
      feedback_(*feedback),
      scales_(*scales),
      at_once_(std::max<int64_t>(1, kSectionColumns / w_.group_size)) {
  const int64_t columns = std::min(w_.cols, at_once_ * w_.group_size);
  const auto of_section = [&] { return run->gpu.memory<float>(columns * w_.stride); };
  section_.rows_of_h = run->gpu.memory<float>(columns * w_.cols);
  section_.inside = run->gpu.memory<float>(columns * columns);
  section_.ones = run->gpu.memory<float>(columns);
  section_.units = of_section();
  section_.he = of_section();
  section_.hd = of_section();
  section_.change = of_section();
  changed_ = run->gpu.memory<unsigned long long>(1);
}

int64_t GpuRefit::run(int sweeps) {
  // Double-quantized scales are kept only if the whole matrix gains.
  const bool judged = scales_.format().double_quant;
  const double before = judged ? feedback_.total_loss() : 0.0;
  if (judged) scales_.save();
  run_.note(cuda::clear(changed_, sizeof *changed_, run_.stream));
  for (int i = 0; i < sweeps; ++i) sweep();
  const auto changed = static_cast<int64_t>(run_.download(changed_, 1)[0]);
  if (changed == 0) return 0;
  scales_.store_matrix();
  if (!judged) return changed;
  feedback_.measure();
  if (feedback_.total_loss() < before) return changed;
  scales_.restore();
  feedback_.measure();
  return 0;
}

void GpuRefit::sweep() {
  for (int64_t first = 0; first < w_.groups; first += at_once_) {
    const int64_t last = std::min(w_.groups, first + at_once_);
    begin_section(first * w_.group_size, std::min(w_.cols, last * w_.group_size));
    for (int64_t g = first; g < last; ++g) update(g);
  }
}

void GpuRefit::begin_section(int64_t low, int64_t high) {
  section_.low = low;
  section_.size = high - low;
  run_.note(cuda::gather_hessian(w_, layer_.places, layer_.hessian, section_, run_.stream));
  run_.note(cuda::decode_units(w_, layer_.encoding, section_, run_.stream));
  algebra_.gemm(false, false, section_.size, w_.rows, w_.cols, 1.0f, section_.rows_of_h, w_.cols,
                feedback_.error(), w_.stride, 0.0f, section_.he, w_.stride);
}

// H times the errors as they are by now, and times the unit decode, then the scales.
void GpuRefit::update(int64_t group) {
  const int64_t first = group * w_.group_size - section_.low, size = section_.size;
  const int64_t n = std::min(w_.group_size, size - first);
  const float* inside = section_.inside + first * size;
  if (first > 0) {
    algebra_.gemm(false, false, n, w_.rows, first, 1.0f, inside, size, section_.change, w_.stride,
                  1.0f, section_.he + first * w_.stride, w_.stride);
  }
  algebra_.gemm(false, false, n, w_.rows, n, 1.0f, inside + first, size,
                section_.units + first * w_.stride, w_.stride, 0.0f,
                section_.hd + first * w_.stride, w_.stride);
  run_.note(cuda::refit_group(w_, layer_.encoding, layer_.places, section_, group,
                              scales_.exponent(), feedback_.error(), feedback_.loss(), changed_,
                              run_.stream));
}

}  // namespace bitfold
