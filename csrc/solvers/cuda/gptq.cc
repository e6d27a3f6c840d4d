#include "solvers/cuda/gptq.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "cuda/statistics.h"
#include "solvers/cuda/layer.h"
#include "solvers/cuda/refit.h"

namespace bitfold {
namespace {

constexpr int kRefitSweeps = 2;
constexpr int64_t kPanelRows = 16;  // measured rows come in panels, as on the CPU

class GpuGptq {
 public:
  GpuGptq(const Gpu& gpu, const Format& format, const MatrixView& w, const HessianView& h,
          const GptqOptions& options, void* const* buffers, GptqReport* report)
      : run_(gpu, options.timed),
        stream_(gpu.stream),
        algebra_(gpu.algebra),
        format_(format),
        source_(w),
        mean_{h.data, h.fp64, h.n},
        options_(options),
        buffers_(buffers),
        n_(w.cols),
        rows_(w.rows),
        report_(*report) {}

  Status run() {
    const std::vector<double> diagonal = look_at(&run_, mean_, options_.cross, source_);
    if (!run_.ok()) return run_.status();
    begin_report();
    run_.timed(&report_.seconds.factor, [&] {
      factor_ = factorize(&run_, mean_, diagonal, options_.order, group_size(), options_.damping,
                          options_.sweeps > 0 || options_.refits > 0);
    });
    importance_ = run_.upload(
        column_importance(options_.scales, format_.bits(), factor_.f, diagonal, factor_.own));
    GpuLayer layer = lay_out(&run_, format_, source_, factor_, options_.exact);
    layer_ = &layer;
    if (found() && options_.cross) move_target();
    GpuScales scales(&run_, format_, layer.w, layer.encoding, buffers_);
    scales_ = &scales;
    run_.timed(&report_.seconds.scales, [&] { choose_static_scales(); });
    found() ? solve() : round_plainly();
    scales.store_codes();
    if (run_.ok()) end_report();
    return run_.status();
  }

 private:
  int64_t group_size() const {
    return format_.grouping == Grouping::kGroup ? format_.group_size : n_;
  }
  bool found() const { return factor_.f.found; }
  bool is_dynamic() const {
    return options_.dynamic && found() && format_.grouping == Grouping::kGroup;
  }
  const cuda::RoundingMatrix& w() const { return layer_->w; }

  // W <- W + alpha W C H^-1 (solvers/gptq.h), transposed as H^-1 C^T W^T.
  void move_target() {
    const int64_t stride = w().stride;
    auto* product = run_.gpu.memory<float>(n_ * stride);
    auto* placed = run_.gpu.memory<float>(n_ * stride);
    algebra_.gemm(true, false, n_, rows_, n_, static_cast<float>(options_.alpha), options_.cross,
                  n_, w().weights, stride, 0.0f, product, stride);
    run_.note(cuda::gather_columns(w(), layer_->places, product, placed, stream_));
    algebra_.cholesky_solve(n_, layer_->lower, rows_, placed, stride);
    run_.note(cuda::add_columns(w(), layer_->places, placed, w().weights, stream_));
    source_ = {w().weights, FloatType::kFloat32, rows_, n_, 1, stride};
  }

  // Of the columns from `first` on.
  cuda::Counts counts_from(int64_t first) const {
    return {importance_ + first, layer_->places.dead + first,
            options_.exact ? options_.exact + first : nullptr, n_};
  }
  void choose_scales(const MatrixView& from, const cuda::Spans& spans, bool search,
                     const cuda::Counts& counts, float* scale, float* zero) {
    const auto choose = search ? cuda::search_scales : cuda::round_scales;
    run_.note(choose(from, spans, layer_->encoding, counts, scale, zero, stream_));
  }

  void choose_static_scales() {
    // Where they are chosen on the way, these tell only how large they will be.
    const bool search = (options_.scales != ScaleChoice::kRange || !found()) && !is_dynamic();
    float *scale = scales_->scale(), *zero = scales_->zero();
    if (format_.grouping == Grouping::kTensor) {
      auto *low = run_.gpu.memory<float>(rows_), *high = run_.gpu.memory<float>(rows_);
      run_.note(cuda::round_tensor_scale(source_, layer_->encoding, counts_from(0), low, high,
                                         scale, zero, stream_));
    } else {
      choose_scales(source_, scales_->spans(), search, counts_from(0), scale, zero);
    }
    scales_->find_exponent();
    is_dynamic() ? scales_->spread() : scales_->store();
  }

  void solve() {
    GpuFeedback feedback(&run_, *layer_, loss_, &report_.seconds);
    if (is_dynamic()) {
      feedback.solve([&](int64_t group, const float* values, int64_t columns) {
        float* scale = w().scale + group * w().stride;
        float* zero = w().zero + group * w().stride;
        choose_scales({values, FloatType::kFloat32, rows_, columns, 1, w().stride},
                      {1, columns, rows_}, options_.scales != ScaleChoice::kRange,
                      counts_from(group * w().group_size), scale, zero);
        scales_->round(rows_, scale, zero);
      });
      scales_->store_matrix();
    }
    // Double-quantized scales are known once all of them are: a second pass takes them as they are.
    if (!is_dynamic() || format_.double_quant) feedback.solve();
    measure(nullptr);
    const bool goes_on = options_.sweeps > 0 || options_.refits > 0;
    if (goes_on) report_.feedback = feedback.total_loss();
    for (int i = 0; i < options_.sweeps; ++i) feedback.sweep();
    if (options_.refits > 0) refit(&feedback);
    measure(feedback.error());
    run_.note(cuda::sum_squares(w(), layer_->places, feedback.error(), squares_, stream_));
  }

  void refit(GpuFeedback* feedback) {
    GpuRefit refit(&run_, *layer_, feedback, scales_);
    for (int i = 0; i < options_.refits; ++i) {
      const int64_t changed = refit.run(kRefitSweeps);
      report_.refitted += static_cast<double>(changed);
      if (options_.sweeps > 0) feedback->sweep();
      if (changed == 0) break;
    }
  }

  void round_plainly() {
    auto* error = run_.gpu.memory<float>(n_ * rows_);
    run_.note(cuda::round_plainly(w(), layer_->encoding, nullptr, rows_, error, stream_));
    measure(nullptr);
  }

  // ---- the report: sums over rows, read all at once

  // [rows] losses, [cols] squares by position, then RowLoss of the measured rows, of plain rounding
  // and of what is stored.
  void begin_report() {
    for (int64_t p :
         measured_panels((rows_ + kPanelRows - 1) / kPanelRows, options_.measured_rows)) {
      for (int64_t r = p * kPanelRows; r < std::min(rows_, (p + 1) * kPanelRows); ++r)
        measured_.push_back(static_cast<int32_t>(r));
    }
    if (!measured_.empty()) measured_rows_ = run_.upload(measured_);
    loss_ = run_.gpu.memory<double>(sums_count());
    squares_ = loss_ + rows_;
    plain_ = reinterpret_cast<cuda::RowLoss*>(squares_ + n_);
    final_ = plain_ + measured_.size();
    run_.note(cuda::clear(loss_, 8 * sums_count(), stream_));
  }
  int64_t sums_count() const { return rows_ + n_ + 2 * 3 * static_cast<int64_t>(measured_.size()); }

  // Products of the measured rows with the Hessian: of the errors there, by position, or of plain
  // rounding.
  void measure(const float* error) {
    const auto count = static_cast<int64_t>(measured_.size());
    if (count == 0) return;
    if (!products_) {
      picked_ = run_.gpu.memory<float>(n_ * count);
      products_ = run_.gpu.memory<double>(n_ * count);
      if (mean_.fp64) wide_picked_ = run_.gpu.memory<double>(n_ * count);
    }
    run_.note(
        error
            ? cuda::pick_errors(w(), layer_->places, error, measured_rows_, count, picked_, stream_)
            : cuda::round_plainly(w(), layer_->encoding, measured_rows_, count, picked_, stream_));
    if (mean_.fp64) {
      run_.note(cuda::widen(picked_, n_ * count, wide_picked_, stream_));
      algebra_.gemm64(false, false, n_, count, n_, 1.0, static_cast<const double*>(mean_.data), n_,
                      wide_picked_, count, 0.0, products_, count);
    } else {
      algebra_.gemm(false, false, n_, count, n_, 1.0f, static_cast<const float*>(mean_.data), n_,
                    picked_, count, 0.0f, reinterpret_cast<float*>(products_), count);
    }
    run_.note(cuda::sum_losses(n_, count, layer_->places, picked_, products_, mean_.fp64,
                               factor_.own_on_gpu, error ? final_ : plain_, stream_));
  }

  static cuda::RowLoss sum_of(const double* rows, size_t count) {
    cuda::RowLoss sum{};
    for (size_t i = 0; i < count; ++i, rows += 3) {
      sum.loss += rows[0];
      sum.predicted += rows[1];
      sum.squares += rows[2];
    }
    return sum;
  }

  void end_report() {
    static_assert(sizeof(cuda::RowLoss) == 3 * sizeof(double));
    const std::vector<double> all = run_.download(loss_, sums_count());
    const size_t count = measured_.size();
    const double* rows = all.data() + rows_ + n_;
    const cuda::RowLoss plain = sum_of(rows, count), final = sum_of(rows + 3 * count, count);
    const double added = factor_.f.added;
    const double times = count > 0 ? static_cast<double>(rows_) / static_cast<double>(count) : 0.0;
    GptqReport& r = report_;
    r.damping = factor_.f.damping;
    r.dead = static_cast<double>(factor_.f.dead_count);
    r.fp64 = factor_.f.fp64;
    r.fallback = !found();
    r.measured_rows = static_cast<double>(count);
    r.plain = plain.loss * times;
    r.plain_damped = (plain.loss + added * plain.squares) * times;
    r.predicted = plain.predicted * times;
    if (!found()) {
      r.loss = r.plain;
      r.damped = r.feedback = r.measured = r.tracked = r.predicted = r.plain_damped;
      return;
    }
    const auto squares = all.begin() + rows_;
    r.damped = std::accumulate(all.begin(), squares, 0.0);
    if (options_.sweeps == 0 && options_.refits == 0) r.feedback = r.damped;
    r.loss = r.damped - added * std::accumulate(squares, squares + n_, 0.0);
    r.measured = final.loss + added * final.squares;
    for (int32_t row : measured_) r.tracked += all[static_cast<size_t>(row)];
  }

  GpuRun run_;
  const cudaStream_t stream_;
  const LinearAlgebra& algebra_;
  const Format& format_;
  MatrixView source_;  // that scales are chosen for
  const cuda::MeanView mean_;
  const GptqOptions& options_;
  void* const* buffers_;
  const int64_t n_, rows_;
  GptqReport& report_;

  GpuFactor factor_;
  GpuLayer* layer_ = nullptr;
  GpuScales* scales_ = nullptr;
  std::vector<int32_t> measured_;
  // In the GPU's memory:
  const float* importance_ = nullptr;  // [cols]
  double *loss_ = nullptr, *squares_ = nullptr;
  cuda::RowLoss *plain_ = nullptr, *final_ = nullptr;
  const int32_t* measured_rows_ = nullptr;
  float* picked_ = nullptr;
  double *products_ = nullptr, *wide_picked_ = nullptr;
};

Status cpu_only(const Format& format, const char* what) {
  return Status::error(
      StatusCode::kInvalidArgument,
      format.to_string() + what + " is solved on the CPU only; move weight and Hessian there");
}

}  // namespace

bool can_solve_on_gpu(const Format& format, ScaleChoice scales, int refits) {
  const bool chosen_for_tensor =
      format.grouping == Grouping::kTensor && (scales != ScaleChoice::kRange || refits > 0);
  return format.family() != Family::kLearnedCodebook && !chosen_for_tensor;
}

Status gptq_quantize(const Gpu& gpu, const Format& format, const MatrixView& w,
                     const HessianView& h, const GptqOptions& options, void* const* buffers,
                     GptqReport* report) {
  if (Status status = check_gptq(format, w, h.n, options); !status.ok()) return status;
  if (!can_solve_on_gpu(format, options.scales, options.refits))
    return cpu_only(format, options.refits > 0 ? " with refits" : " with such scales");
  return GpuGptq(gpu, format, w, h, options, buffers, report).run();
}

Status refit_packed(const Gpu& gpu, const Format& format, const MatrixView& w, const HessianView& h,
                    double damping, int sweeps, void* const* buffers, double* before,
                    double* after) {
  if (Status status = check_gptq(format, w, h.n, {}); !status.ok()) return status;
  if (!can_solve_on_gpu(format, ScaleChoice::kRange, /*refits=*/1)) return cpu_only(format, "");
  GpuRun run(gpu, /*timed=*/false);
  const cuda::MeanView mean{h.data, h.fp64, h.n};
  const std::vector<double> diagonal = look_at(&run, mean, nullptr, w);
  if (!run.ok()) return run.status();
  const GpuFactor factor = factorize(&run, mean, diagonal, ColumnOrder::kGiven, w.cols, damping,
                                     /*keep_hessian=*/true);
  if (!run.ok()) return run.status();
  if (!factor.f.found) return not_positive_definite();
  const GpuLayer layer = lay_out(&run, format, w, factor, nullptr);
  GpuScales scales(&run, format, layer.w, layer.encoding, buffers);
  scales.read_packed();
  Seconds seconds;
  GpuFeedback feedback(&run, layer, gpu.memory<double>(w.rows), &seconds);
  feedback.measure();
  *before = feedback.total_loss();
  GpuRefit(&run, layer, &feedback, &scales).run(sweeps);
  *after = feedback.total_loss();
  return run.status();
}

}  // namespace bitfold
