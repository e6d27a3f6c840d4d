#include "solvers/cuda/feedback.h"

#include <algorithm>
#include <numeric>

#include "cpu/kernel_table.h"

namespace bitfold {

static_assert(kFeedbackColumns == cuda::kBlockColumns);

GpuFeedback::GpuFeedback(GpuRun* run, const GpuLayer& layer, double* loss, Seconds* seconds)
    : run_(*run),
      algebra_(run->gpu.algebra),
      layer_(layer),
      w_(layer.w),
      seconds_(*seconds),
      n_(layer.w.cols),
      rows_(layer.w.rows),
      loss_(loss),
      error_(run->gpu.memory<float>(n_ * layer.w.stride)) {}

void GpuFeedback::make_room(int64_t columns) {
  if (columns <= room_) return;
  room_ = columns;
  correction_ = run_.gpu.memory<float>(columns * w_.stride);
  if (layer_.hessian) change_ = run_.gpu.memory<float>(columns * w_.stride);
}

double GpuFeedback::total_loss() {
  const std::vector<double> losses = run_.download(loss_, rows_);
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

// What the errors of all finished columns (of all columns, if again) add up to for a section.
void GpuFeedback::correct(const float* matrix, bool again, const Section& section) {
  const int64_t columns = section.high - section.low, done = n_ - section.high;
  if (again) {
    algebra_.gemm(false, false, columns, rows_, n_, 1.0f, matrix + section.low * n_, n_, error_,
                  w_.stride, 0.0f, correction_, w_.stride);
  } else if (done > 0) {
    algebra_.gemm(true, false, columns, rows_, done, 1.0f, matrix + section.high * n_ + section.low,
                  n_, row_of(error_, section.high), w_.stride, 0.0f, correction_, w_.stride);
  } else {
    run_.note(cuda::clear(correction_, columns * w_.stride * 4, run_.stream));
  }
}

// What a block means for those after it in its section. The CPU adds up, block by block, what came
// before; this way the products have more rows, and all multiprocessors work.
void GpuFeedback::pass_on(const float* matrix, bool again, const Section& section,
                          const Block& block) {
  const float* errors =
      again ? row_of(change_, block.low - section.low) : row_of(error_, block.low);
  algebra_.gemm(true, false, block.low - section.low, rows_, block.high - block.low, 1.0f,
                matrix + block.low * n_ + section.low, n_, errors, w_.stride, 1.0f, correction_,
                w_.stride);
}

void GpuFeedback::start_group(const float* matrix, const Section& section, const Block& block,
                              const ChooseScales& choose) {
  const int64_t group = layer_.f.column[static_cast<size_t>(block.group_low)] / w_.group_size;
  run_.note(cuda::begin_group(w_, layer_.places, matrix, block.group_low, block.high,
                              row_of(correction_, block.group_low - section.low), values_,
                              run_.stream));
  choose(group, values_, block.high - block.group_low);
}

void GpuFeedback::round_block(const float* matrix, bool again, const Section& section,
                              const Block& block) {
  const int64_t last = block.high - 1 - section.low;
  run_.note(cuda::feed_back(
      w_, layer_.encoding, layer_.places,
      {matrix, block.high, static_cast<int>(block.high - block.low), again,
       row_of(correction_, last), error_, again ? row_of(change_, last) : nullptr, loss_},
      run_.stream));
}

void GpuFeedback::pass(const float* matrix, bool again, const std::vector<Section>& sections,
                       const ChooseScales& choose) {
  for (const Section& section : sections) {
    make_room(section.high - section.low);
    run_.timed(&seconds_.products, [&] { correct(matrix, again, section); });
    for (const Block& block : section.blocks) {
      if (choose && block.group_low >= 0)
        run_.timed(&seconds_.scales, [&] { start_group(matrix, section, block, choose); });
      run_.timed(&seconds_.columns, [&] { round_block(matrix, again, section, block); });
      if (block.low > section.low)
        run_.timed(&seconds_.products, [&] { pass_on(matrix, again, section, block); });
    }
  }
}

void GpuFeedback::solve() {
  clear_losses();
  pass(layer_.lower, /*again=*/false, plan_sections(n_), nullptr);
}

void GpuFeedback::solve(const ChooseScales& choose) {
  clear_losses();
  values_ = run_.gpu.memory<float>(std::min(w_.group_size, n_) * w_.stride);
  pass(layer_.lower, /*again=*/false, plan_sections_by_group(layer_.f.column, w_.group_size),
       choose);
}

void GpuFeedback::sweep() { pass(layer_.hessian, /*again=*/true, plan_sections(n_), nullptr); }

void GpuFeedback::measure() {
  run_.note(cuda::decode_errors(w_, layer_.encoding, layer_.places, error_, run_.stream));
  clear_losses();
  for (const Section& section : plan_sections(n_)) {
    make_room(section.high - section.low);
    correct(layer_.hessian, /*again=*/true, section);
    run_.note(cuda::add_losses(w_, layer_.places, section.low, section.high - section.low, error_,
                               correction_, loss_, run_.stream));
  }
}

}  // namespace bitfold
