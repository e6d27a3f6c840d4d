#include "solvers/gptq.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>

#include "core/scale_coding.h"
#include "solvers/kmeans.h"
#include "solvers/panel_scales.h"
#include "solvers/refit.h"
#include "solvers/row_reader.h"
#include "solvers/sampled_loss.h"

namespace bitfold {
namespace {

constexpr int kRefitSweeps = 2;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Gptq {
 public:
  Gptq(const Cpu& cpu, const Format& format, const MatrixView& w, const HessianView& h,
       const GptqOptions& options, void* const* buffers, GptqReport* report)
      : algebra_(cpu.algebra),
        format_(format),
        source_(w),
        h_(h),
        options_(options),
        buffers_(buffers),
        parallel_(cpu.parallel),
        report_(*report),
        w_(cpu.kernels, format, w.rows, w.cols),
        storage_(cpu.kernels, format, w.rows, w.cols, buffers, cpu.parallel) {}

  Status run() {
    const double start = now();
    f_ =
        factorize(h_, order_columns(options_.order, h_.diagonal(), w_.group_size), options_.damping,
                  options_.sweeps > 0 || options_.refits > 0, algebra_, parallel_);
    const double factored = now();
    const Status status = w_.read(source_, f_.dead, parallel_);
    if (!status.ok()) return status;
    if (options_.exact) w_.read_exact(options_.exact, parallel_);
    if (f_.found && options_.cross) move_target();
    const double read = now();
    if (is_learned()) {
      learn_books();
    } else {
      choose_static_scales();
    }
    const double scaled = now();
    f_.found ? solve() : round_plainly();
    w_.store_codes(&storage_, parallel_);
    report_.damping = f_.damping;
    report_.dead = static_cast<double>(f_.dead_count);
    report_.fp64 = f_.fp64;
    report_.fallback = !f_.found;
    report_.seconds.factor += factored - start;
    report_.seconds.scales += scaled - read;
    return Status::success();
  }

 private:
  bool is_learned() const { return format_.family() == Family::kLearnedCodebook; }
  bool is_dynamic() const {
    return options_.dynamic && f_.found && !is_learned() && format_.grouping == Grouping::kGroup;
  }

  std::vector<float> importance() const {
    std::vector<float> own;
    for (int64_t a = 0; f_.found && a < w_.cols; ++a)
      own.push_back(f_.lower[static_cast<size_t>(a * w_.cols + a)]);
    return column_importance(options_.scales, format_.bits(), f_, h_.diagonal(), own);
  }

  void choose_static_scales() {
    // Where they are chosen on the way, these tell only how large they will be.
    const bool search = (options_.scales != ScaleChoice::kRange || !f_.found) && !is_dynamic();
    choose_scales(&w_, search, importance(), parallel_);
    MagnitudeRange range;
    std::vector<float> scales, zeros;
    w_.collect(&scales, &zeros);
    range.add(scales.data(), static_cast<int64_t>(scales.size()));
    exponent_ = choose_exponent(range);
    if (!is_dynamic()) w_.store_scales(exponent_, &storage_);
  }

  // Levels by k-means, weighted by importance.
  void learn_books() {
    const int levels = 1 << format_.bits();
    const std::vector<float> of_column =
        options_.scales == ScaleChoice::kRange
            ? std::vector<float>(static_cast<size_t>(w_.cols), 1.0f)
            : importance();
    const bool shared = format_.grouping == Grouping::kTensor;
    std::vector<float> books(static_cast<size_t>(format_.scale_rows(w_.rows) * levels));
    PointHistogram histogram;
    const auto learn = [&](int64_t begin, int64_t end) {
      std::vector<float> row(static_cast<size_t>(w_.cols)), weight(row.size());
      for (int64_t r = begin; r < end; ++r) {
        const int64_t p = r / kPanelLanes, lane = r % kPanelLanes;
        for (int64_t c = 0; c < w_.cols; ++c) {
          const int64_t at = c * kPanelLanes + lane;
          const bool counts = !w_.exact || !w_.exact_of(p)[at];
          row[static_cast<size_t>(c)] = w_.weights_of(p)[at];
          weight[static_cast<size_t>(c)] = counts ? of_column[static_cast<size_t>(c)] : 0.0f;
        }
        if (shared) {
          histogram.add(row.data(), weight.data(), w_.cols);
        } else {
          const std::vector<float> found =
              kmeans(points_of(row.data(), weight.data(), w_.cols), levels);
          std::copy(found.begin(), found.end(), books.begin() + r * levels);
        }
      }
    };
    if (shared) {
      learn(0, w_.rows);
      books = kmeans(histogram.points(), levels);
    } else {
      parallel_(w_.rows, grain(w_.cols, kGrainWeights), learn);
    }
    storage_.store_books(&books);
    w_.read_books(make_view(format_, w_.rows, w_.cols, buffers_));
  }

  // W <- W + alpha W C H^-1 (solvers/gptq.h), transposed as H^-1 C^T W^T.
  void move_target() {
    const int64_t n = w_.cols, width = w_.width();
    const auto size = static_cast<size_t>(n * width);
    std::unique_ptr<float[]> transposed(new float[size]), product(new float[size]);
    for (int64_t p = 0; p < w_.panels; ++p) {
      for (int64_t c = 0; c < n; ++c) {
        std::copy_n(w_.weights_of(p) + c * kPanelLanes, kPanelLanes,
                    transposed.get() + c * width + p * kPanelLanes);
      }
    }
    algebra_.gemm(true, false, n, width, n, static_cast<float>(options_.alpha), options_.cross, n,
                  transposed.get(), width, 0.0f, product.get(), width);
    for (int64_t a = 0; a < n; ++a) {
      const int64_t c = f_.column[static_cast<size_t>(a)];
      std::copy_n(product.get() + c * width, width, transposed.get() + a * width);
    }
    algebra_.cholesky_solve(n, f_.lower.get(), width, transposed.get(), width);
    for (int64_t p = 0; p < w_.panels; ++p) {
      for (int64_t a = 0; a < n; ++a) {
        const int64_t c = f_.column[static_cast<size_t>(a)];
        if (f_.dead[static_cast<size_t>(c)]) continue;
        float* to = w_.weights_of(p) + c * kPanelLanes;
        const float* from = transposed.get() + a * width + p * kPanelLanes;
        for (int64_t i = 0; i < kPanelLanes; ++i) to[i] += from[i];
      }
    }
  }

  void solve() {
    Feedback feedback(&w_, f_, algebra_, parallel_);
    if (is_dynamic()) {
      const bool search = options_.scales != ScaleChoice::kRange;
      feedback.solve(
          [&](const float* block, const float* weight, int64_t n, float* scale, float* zero) {
            choose_group_scales(w_.k, w_.encoding, search, block, weight, n, scale, zero);
            storage_.round(exponent_, kPanelLanes, scale, zero);
          },
          importance());
      w_.store_scales(exponent_, &storage_);
    }
    // Double-quantized scales are known once all of them are: a second pass takes them as they are.
    if (!is_dynamic() || format_.double_quant) feedback.solve();
    report_.feedback = feedback.total_loss();
    measure(nullptr);

    for (int i = 0; i < options_.sweeps; ++i) feedback.sweep();
    for (int i = 0; i < options_.refits; ++i) {
      const int64_t changed =
          refit_scales(&w_, &feedback, f_, kRefitSweeps, exponent_, &storage_, algebra_, parallel_);
      report_.refitted += static_cast<double>(changed);
      if (options_.sweeps > 0) feedback.sweep();
      if (changed == 0) break;
    }
    report_.damped = feedback.total_loss();
    report_.loss = report_.damped - f_.added * squares(&feedback);
    measure(&feedback);
    report_.seconds = feedback.seconds;
  }

  // Sum of squared errors, dead inputs left out.
  double squares(Feedback* feedback) const {
    std::vector<double> of_position(static_cast<size_t>(w_.cols));
    parallel_(w_.cols, 1, [&](int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) {
        if (f_.dead[static_cast<size_t>(f_.column[static_cast<size_t>(a)])]) continue;
        const float* row = feedback->error() + a * feedback->stride();
        double sum = 0.0;
        for (int64_t r = 0; r < w_.rows; ++r) sum += static_cast<double>(row[r]) * row[r];
        of_position[static_cast<size_t>(a)] = sum;
      }
    });
    double sum = 0.0;
    for (double v : of_position) sum += v;
    return sum;
  }

  // Direct measurements of some rows: of what `feedback` holds, else of plain rounding.
  void measure(Feedback* feedback) {
    const SampledLoss sampled =
        sample_loss(&w_, f_, h_, options_.measured_rows, feedback, algebra_, parallel_);
    report_.measured_rows = sampled.rows;
    if (feedback) {
      report_.measured = sampled.loss + sampled.added;
      report_.tracked = sampled.tracked;
    } else {
      const double all = sampled.rows > 0.0 ? static_cast<double>(w_.rows) / sampled.rows : 0.0;
      report_.plain = sampled.loss * all;
      report_.plain_damped = (sampled.loss + sampled.added) * all;
      report_.predicted = sampled.predicted * all;
    }
  }

  void round_plainly() {
    parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> error(static_cast<size_t>(w_.cols * kPanelLanes));
      for (int64_t p = begin; p < end; ++p) w_.round(p, error.data(), w_.codes_of(p));
    });
    measure(nullptr);
    report_.loss = report_.plain;
    report_.damped = report_.feedback = report_.plain_damped;
    report_.measured = report_.tracked = report_.predicted = report_.plain_damped;
  }

  const LinearAlgebra& algebra_;
  const Format& format_;
  const MatrixView& source_;
  const HessianView& h_;
  const GptqOptions& options_;
  void* const* buffers_;
  const Parallel& parallel_;
  GptqReport& report_;
  PanelMatrix w_;
  ScaleStorage storage_;
  Factorization f_;
  int exponent_ = 0;
};

}  // namespace

Status gptq_quantize(const Cpu& cpu, const Format& format, const MatrixView& w,
                     const HessianView& h, const GptqOptions& options, void* const* buffers,
                     GptqReport* report) {
  Status status = check_gptq(format, w, h.n, options);
  if (status.ok()) status = h.check_finite(cpu.parallel);
  if (status.ok() && options.cross)
    status = HessianView{options.cross, /*fp64=*/false, w.cols}.check_finite(cpu.parallel, "cross");
  if (!status.ok()) return status;
  status = Gptq(cpu, format, w, h, options, buffers, report).run();
  if (!options.timed) report->seconds = {};
  return status;
}

Status refit_packed(const Cpu& cpu, const Format& format, const MatrixView& w, const HessianView& h,
                    double damping, int sweeps, void* const* buffers, double* before,
                    double* after) {
  const auto& [k, algebra, parallel] = cpu;
  Status status = check_gptq(format, w, h.n, {});
  if (status.ok()) status = h.check_finite(parallel);
  if (!status.ok()) return status;
  const std::vector<double> diagonal = h.diagonal();
  const Factorization f =
      factorize(h, order_columns(ColumnOrder::kGiven, diagonal, w.cols), damping,
                /*keep_hessian=*/true, algebra, parallel);
  if (!f.found) return not_positive_definite();
  PanelMatrix panels(k, format, w.rows, w.cols);
  status = panels.read(w, f.dead, parallel);
  if (!status.ok()) return status;
  const PackedView packed = make_view(format, w.rows, w.cols, buffers);
  panels.read_packed(packed, parallel);
  ScaleStorage storage(k, format, w.rows, w.cols, buffers, parallel);
  int exponent = 0;
  if (storage.stores_halves()) exponent = *storage.buffer<int8_t>(BufferRole::kExponent);
  Feedback feedback(&panels, f, algebra, parallel);
  feedback.measure();
  *before = feedback.total_loss();
  refit_scales(&panels, &feedback, f, sweeps, exponent, &storage, algebra, parallel);
  *after = feedback.total_loss();
  return Status::success();
}

}  // namespace bitfold
