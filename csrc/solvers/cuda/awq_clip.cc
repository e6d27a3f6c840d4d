#include <algorithm>

#include "cuda/awq.h"
#include "solvers/cuda/awq.h"
#include "solvers/cuda/layer.h"
#include "solvers/cuda/scales.h"
#include "solvers/options.h"

namespace bitfold {
namespace {

constexpr float kFinest = 0.25f;       // below what clipping makes of a scale, with room to spare
constexpr int64_t kTileColumns = 512;  // of one group; what tiles share is left out
constexpr int64_t kRowsAtOnce =
    4096;  // errors of all candidates of a tile: 84 MB, and H times them

class GpuClipSearch {
 public:
  GpuClipSearch(GpuRun* run, const GpuLayer& layer, const float* hessian, GpuScales* scales)
      : run_(*run), layer_(layer), w_(layer.w), hessian_(hessian), scales_(*scales) {}

  // sums [rows] grow.
  void run(cuda::ClipSums* sums) {
    const int64_t rows = std::min(kRowsAtOnce, w_.rows);
    const int64_t candidates = cuda::kClipCandidates * rows;
    const int64_t columns = std::min({kTileColumns, w_.group_size, w_.cols});
    cuda::ClipGroup group{};
    group.scale = run_.gpu.memory<float>(candidates);
    group.zero = run_.gpu.memory<float>(candidates);
    group.loss = run_.gpu.memory<double>(candidates);
    error_ = run_.gpu.memory<float>(columns * candidates);
    product_ = run_.gpu.memory<float>(columns * candidates);
    for (group.first_row = 0; group.first_row < w_.rows; group.first_row += rows) {
      group.rows = std::min(rows, w_.rows - group.first_row);
      for (group.group = 0; group.group < w_.groups; ++group.group) {
        judge(group);
        run_.note(cuda::take_clips(w_, group, sums, run_.stream));
      }
    }
  }

 private:
  void judge(const cuda::ClipGroup& group) {
    run_.note(cuda::propose_clips(w_, layer_.encoding, scales_.rounding(), scales_.exponent(),
                                  group, run_.stream));
    const int64_t width = cuda::kClipCandidates * group.rows;
    const int64_t begin = group.group * w_.group_size;
    const int64_t end = std::min(w_.cols, begin + w_.group_size);
    for (int64_t low = begin; low < end; low += kTileColumns) {
      const int64_t n = std::min(kTileColumns, end - low);
      run_.note(cuda::round_clips(w_, layer_.encoding, group, low, n, error_, run_.stream));
      run_.gpu.algebra.gemm(false, false, n, width, n, 1.0f, hessian_ + low * w_.cols + low,
                            w_.cols, error_, width, 0.0f, product_, width);
      run_.note(cuda::add_clip_losses(group, n, error_, product_, run_.stream));
    }
  }

  GpuRun& run_;
  const GpuLayer& layer_;
  const cuda::RoundingMatrix& w_;
  const float* hessian_;
  GpuScales& scales_;
  float *error_ = nullptr, *product_ = nullptr;  // [columns of a tile, candidates, rows]
};

}  // namespace

Status awq_clip(const Gpu& gpu, const Format& format, Method method, const MatrixView& w,
                const float* hessian, const uint8_t* exact, void* const* buffers, AwqClip* found) {
  if (Status status = check_awq_clip(format, w); !status.ok()) return status;
  *found = {};
  GpuRun run(gpu, /*timed=*/false);
  look_at(&run, {hessian, false, w.cols}, nullptr, w);
  if (!run.ok()) return run.status();
  const GpuFactor factor = without_factor(&run, w.cols);
  const GpuLayer layer = lay_out(&run, format, w, factor, exact);
  GpuScales scales(&run, format, layer.w, layer.encoding, buffers);
  const std::vector<float> alike(static_cast<size_t>(w.cols), 1.0f);
  const cuda::Counts counts{run.upload(alike), layer.places.dead, exact, w.cols};
  const auto choose = method == Method::kSearch ? cuda::search_scales : cuda::round_scales;
  run.note(
      choose(w, scales.spans(), layer.encoding, counts, scales.scale(), scales.zero(), run.stream));
  scales.find_exponent(kFinest);
  scales.spread();
  auto* sums = gpu.memory<cuda::ClipSums>(w.rows);
  run.note(cuda::clear(sums, w.rows * static_cast<int64_t>(sizeof *sums), run.stream));
  GpuClipSearch(&run, layer, hessian, &scales).run(sums);
  scales.collect();
  scales.find_exponent();
  scales.store();
  run.note(cuda::round_plainly(layer.w, layer.encoding, nullptr, w.rows,
                               gpu.memory<float>(w.rows * w.cols), run.stream));
  scales.store_codes();
  for (const cuda::ClipSums& row : run.download(sums, w.rows)) {
    found->clipped += static_cast<int64_t>(row.clipped);
    found->before += row.before;
    found->after += row.after;
  }
  found->groups = w.rows * layer.w.groups;
  return run.status();
}

}  // namespace bitfold
