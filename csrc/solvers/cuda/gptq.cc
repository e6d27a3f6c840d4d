#include "solvers/cuda/gptq.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "core/float16.h"
#include "cuda/copy.h"
#include "cuda/rounding.h"
#include "cuda/statistics.h"
#include "solvers/row_reader.h"
#include "solvers/sampled_loss.h"

namespace bitfold {
namespace {

static_assert(kFeedbackColumns == cuda::kBlockColumns);

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool is_nan(const MatrixView& w, int64_t row, int64_t col, cudaStream_t stream, Status* status) {
  const void* at = advance(w.data, w.dtype, row * w.row_stride + col * w.col_stride);
  float value = 0.0f;
  uint16_t half = 0;
  if (w.dtype == FloatType::kFloat32) {
    *status = cuda::copy_to_host(&value, at, sizeof value, stream);
  } else {
    *status = cuda::copy_to_host(&half, at, sizeof half, stream);
    value = w.dtype == FloatType::kFloat16 ? half_to_float(half) : bfloat16_to_float(half);
  }
  return std::isnan(value);
}

class GpuGptq {
 public:
  GpuGptq(const Gpu& gpu, const Format& format, const MatrixView& w, const HessianView& h,
          const GptqOptions& options, bool timed, void* const* buffers, GptqReport* report)
      : gpu_(gpu),
        stream_(gpu.stream),
        format_(format),
        source_(w),
        mean_{h.data, h.fp64, h.n},
        options_(options),
        timed_(timed),
        to_(format, w.rows, w.cols, buffers),
        spans_(cuda::spans_of(format, w.rows, w.cols)),
        encoding_(cuda::make_encoding(format)),
        n_(w.cols),
        rows_(w.rows),
        report_(*report) {}

  Status run() {
    look();
    if (!status_.ok()) return status_;
    double* const sums = begin_report();
    factorize();
    lay_out();
    if (f_.found && options_.cross) move_target();
    timed(&report_.seconds.scales, [&] { choose_static_scales(); });
    f_.found ? solve() : round_plainly();
    note(cuda::pack_columns(w_, format_.bits(), to_.get<uint8_t>(BufferRole::kCodes), stream_));
    end_report(sums);
    return status_;
  }

 private:
  bool is_dynamic() const {
    return options_.dynamic && f_.found && format_.grouping == Grouping::kGroup;
  }
  bool keeps_hessian() const { return options_.sweeps > 0; }
  float* row_of(float* matrix, int64_t i) const { return matrix + i * w_.stride; }

  // Work that is queued after a failure does no harm: the first one is what is told.
  void note(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  template <class Body>
  void timed(double* seconds, const Body& body) {
    if (!timed_) return body();
    note(cuda::wait_for(stream_));
    const double start = now();
    body();
    note(cuda::wait_for(stream_));
    *seconds += now() - start;
  }

  // The diagonal of H, and whether all is finite.
  void look() {
    constexpr int kLooked = 3;  // hessian, cross, weight
    auto* device = gpu_.memory<double>(kLooked + n_);
    auto* first = reinterpret_cast<unsigned long long*>(device);
    const unsigned long long none[kLooked] = {cuda::kNone, cuda::kNone, cuda::kNone};
    const cuda::MeanView cross{options_.cross, /*fp64=*/false, n_};
    note(cuda::copy_to_device(first, none, sizeof none, stream_));
    note(cuda::find_non_finite(mean_, first, stream_));
    if (options_.cross) note(cuda::find_non_finite(cross, first + 1, stream_));
    note(cuda::find_non_finite(source_, first + 2, stream_));
    note(cuda::read_diagonal(mean_, device + kLooked, stream_));
    std::vector<double> host(static_cast<size_t>(kLooked + n_));
    note(cuda::copy_to_host(host.data(), device, static_cast<int64_t>(8 * host.size()), stream_));
    unsigned long long found[kLooked];
    std::memcpy(found, host.data(), sizeof found);
    diagonal_.assign(host.begin() + kLooked, host.end());
    if (found[0] != cuda::kNone) {
      note(non_finite_mean("hessian", mean_, static_cast<int64_t>(found[0])));
    } else if (found[1] != cuda::kNone) {
      note(non_finite_mean("cross", cross, static_cast<int64_t>(found[1])));
    } else if (found[2] != cuda::kNone) {
      const auto at = static_cast<int64_t>(found[2]);
      Status status;
      const bool nan = is_nan(source_, at / n_, at % n_, stream_, &status);
      note(std::move(status));
      note(non_finite_weight(at / n_, at % n_, nan));
    }
  }

  Status non_finite_mean(const char* name, const cuda::MeanView& mean, int64_t at) const {
    double value = 0.0;
    float narrow = 0.0f;
    Status status =
        mean.fp64
            ? cuda::copy_to_host(&value, static_cast<const double*>(mean.data) + at, 8, stream_)
            : cuda::copy_to_host(&narrow, static_cast<const float*>(mean.data) + at, 4, stream_);
    if (!status.ok()) return status;
    return non_finite_entry(name, at / n_, at % n_,
                            std::isnan(mean.fp64 ? value : static_cast<double>(narrow)));
  }

  void factorize() {
    const double start = now();
    f_ =
        begin_factorization(diagonal_, order_columns(options_.order, diagonal_, spans_.group_size));
    std::vector<int32_t> places = f_.column;
    places.resize(static_cast<size_t>(2 * n_));
    for (int64_t a = 0; a < n_; ++a)
      places[static_cast<size_t>(n_ + f_.column[static_cast<size_t>(a)])] = static_cast<int32_t>(a);
    auto* column = upload(places);
    places_ = {column, column + n_, upload(f_.dead)};

    lower_ = gpu_.memory<float>(n_ * n_);
    if (keeps_hessian()) hessian_ = gpu_.memory<float>(n_ * n_);
    own_ = gpu_.memory<double>(n_);
    std::vector<double> own(static_cast<size_t>(n_));
    const auto read_own = [&](const cuda::MeanView& factor) {
      note(cuda::read_diagonal(factor, own_, stream_));
      note(cuda::copy_to_host(own.data(), own_, 8 * n_, stream_));
    };
    double* wide = nullptr;
    climb_damping(
        diagonal_, options_.damping,
        [&](bool fp64) {
          if (!status_.ok()) return false;
          if (!fp64) {
            arrange(lower_);
            if (hessian_) arrange(hessian_);
            if (!gpu_.algebra.cholesky(n_, lower_)) return false;
            read_own({lower_, false, n_});
            return true;
          }
          if (!wide) wide = gpu_.memory<double>(n_ * n_);
          note(cuda::arrange(mean_, places_.column, places_.dead, f_.added, true, wide, stream_));
          if (!gpu_.algebra.cholesky64(n_, wide)) return false;
          read_own({wide, true, n_});
          // In float32 the factor must stay one: no diagonal may vanish.
          const bool stays = std::all_of(own.begin(), own.end(),
                                         [](double v) { return static_cast<float>(v) > 0.0f; });
          note(cuda::narrow(wide, n_ * n_, lower_, stream_));
          return stays;
        },
        &f_);
    importance_ = upload(column_importance(options_.scales, format_.bits(), f_, diagonal_,
                                           std::vector<float>(own.begin(), own.end())));
    report_.seconds.factor += now() - start;
  }
  void arrange(float* to) {
    note(cuda::arrange(mean_, places_.column, places_.dead, f_.added, false, to, stream_));
  }

  template <class T>
  T* upload(const std::vector<T>& values) {
    auto* to = gpu_.memory<T>(static_cast<int64_t>(values.size()));
    note(cuda::copy_to_device(to, values.data(), static_cast<int64_t>(values.size() * sizeof(T)),
                              stream_));
    return to;
  }

  void lay_out() {
    w_.rows = rows_;
    w_.cols = n_;
    w_.groups = spans_.groups;
    w_.group_size = spans_.group_size;
    w_.stride = (rows_ + 3) / 4 * 4;
    w_.weights = gpu_.memory<float>(n_ * w_.stride);
    w_.scale = gpu_.memory<float>(w_.groups * w_.stride);
    w_.zero = gpu_.memory<float>(w_.groups * w_.stride);
    w_.codes = gpu_.memory<uint8_t>(n_ * w_.stride);
    note(cuda::lay_out_weights(source_, places_.dead, w_, stream_));
    if (!options_.exact) return;
    auto* exact = gpu_.memory<uint8_t>(n_ * w_.stride);
    note(cuda::lay_out_exact(options_.exact, rows_, n_, w_.stride, exact, stream_));
    w_.exact = exact;
  }

  // W <- W + alpha W C H^-1 (solvers/gptq.h), transposed as H^-1 C^T W^T.
  void move_target() {
    auto* product = gpu_.memory<float>(n_ * w_.stride);
    auto* placed = gpu_.memory<float>(n_ * w_.stride);
    gpu_.algebra.gemm(true, false, n_, rows_, n_, static_cast<float>(options_.alpha),
                      options_.cross, n_, w_.weights, w_.stride, 0.0f, product, w_.stride);
    note(cuda::gather_columns(w_, places_, product, placed, stream_));
    gpu_.algebra.cholesky_solve(n_, lower_, rows_, placed, w_.stride);
    note(cuda::add_columns(w_, places_, placed, w_.weights, stream_));
    source_ = {w_.weights, FloatType::kFloat32, rows_, n_, 1, w_.stride};
  }

  cuda::Counts counts_of(int64_t first_column) const {
    return {importance_ + first_column, places_.dead + first_column,
            options_.exact ? options_.exact + first_column : nullptr, n_};
  }

  void choose_static_scales() {
    parts_ = gpu_.memory<cuda::ScalePart>(cuda::kParts);
    zero_ = gpu_.memory<float>(spans_.count());
    scale_ = cuda::stores_floats(format_) ? to_.get<float>(BufferRole::kScale)
                                          : gpu_.memory<float>(spans_.count());
    // Where they are chosen on the way, these tell only how large they will be.
    const bool search = (options_.scales != ScaleChoice::kRange || !f_.found) && !is_dynamic();
    if (format_.grouping == Grouping::kTensor) {
      note(cuda::round_tensor_scale(source_, encoding_, counts_of(0), gpu_.memory<float>(rows_),
                                    gpu_.memory<float>(rows_), scale_, zero_, stream_));
    } else {
      note(choose_scales(source_, spans_, search, counts_of(0), scale_, zero_));
    }
    note(cuda::sum_scales(scale_, spans_.count(), parts_, stream_));
    if (!is_dynamic()) store_scales();
    spread_scales();
  }
  Status choose_scales(const MatrixView& from, const cuda::Spans& spans, bool search,
                       const cuda::Counts& counts, float* scale, float* zero) const {
    return search ? cuda::search_scales(from, spans, encoding_, counts, scale, zero, stream_)
                  : cuda::round_scales(from, spans, encoding_, counts, scale, zero, stream_);
  }
  void store_scales() {
    note(cuda::store_scales(format_, spans_, encoding_, to_, /*exactly=*/false, scale_, zero_,
                            parts_, stream_));
  }
  void spread_scales() {
    note(cuda::spread_spans(spans_, scale_, w_, w_.scale, stream_));
    note(cuda::spread_spans(spans_, zero_, w_, w_.zero, stream_));
  }

  void solve() {
    error_ = gpu_.memory<float>(n_ * w_.stride);
    correction_ = gpu_.memory<float>(longest_section() * w_.stride);
    if (is_dynamic()) {
      values_ = gpu_.memory<float>(w_.group_size * w_.stride);
      begin_pass();
      pass(lower_, /*again=*/false, plan_sections_by_group(f_.column, w_.group_size), true);
      note(cuda::collect_spans(spans_, w_.scale, w_, scale_, stream_));
      note(cuda::collect_spans(spans_, w_.zero, w_, zero_, stream_));
      store_scales();
      spread_scales();
    }
    // Double-quantized scales are known once all of them are: a second pass takes them as they are.
    if (!is_dynamic() || format_.double_quant) {
      begin_pass();
      pass(lower_, /*again=*/false, plan_sections(n_), false);
    }
    measure(nullptr);
    if (options_.sweeps > 0) {
      report_.feedback = total(read_losses());
      change_ = gpu_.memory<float>(longest_section() * w_.stride);
      for (int i = 0; i < options_.sweeps; ++i)
        pass(hessian_, /*again=*/true, plan_sections(n_), false);
    }
    measure(error_);
  }
  // A group longer than a section is one.
  int64_t longest_section() const {
    return std::min(n_, std::max(kSectionColumns, is_dynamic() ? w_.group_size : 0));
  }
  void begin_pass() { note(cuda::clear(loss_, 8 * rows_, stream_)); }

  void pass(const float* matrix, bool again, const std::vector<Section>& sections, bool choose) {
    for (const Section& section : sections) {
      timed(&report_.seconds.products, [&] { correct(matrix, again, section); });
      for (const Block& block : section.blocks) {
        if (choose && block.group_low >= 0)
          timed(&report_.seconds.scales, [&] { start_group(matrix, section, block); });
        timed(&report_.seconds.columns, [&] { round_block(matrix, again, section, block); });
        if (block.low > section.low)
          timed(&report_.seconds.products, [&] { pass_on(matrix, again, section, block); });
      }
    }
  }

  // What the errors of all finished columns (of all columns, if again) add up to for a section.
  void correct(const float* matrix, bool again, const Section& section) {
    const int64_t columns = section.high - section.low, done = n_ - section.high;
    if (again) {
      gpu_.algebra.gemm(false, false, columns, rows_, n_, 1.0f, matrix + section.low * n_, n_,
                        error_, w_.stride, 0.0f, correction_, w_.stride);
    } else if (done > 0) {
      gpu_.algebra.gemm(true, false, columns, rows_, done, 1.0f,
                        matrix + section.high * n_ + section.low, n_, row_of(error_, section.high),
                        w_.stride, 0.0f, correction_, w_.stride);
    } else {
      note(cuda::clear(correction_, columns * w_.stride * 4, stream_));
    }
  }

  // Of a block, to those after it in its section: products of more rows than the CPU has, which
  // takes what came before each block, so that there is work for all multiprocessors.
  void pass_on(const float* matrix, bool again, const Section& section, const Block& block) {
    const float* errors =
        again ? row_of(change_, block.low - section.low) : row_of(error_, block.low);
    gpu_.algebra.gemm(true, false, block.low - section.low, rows_, block.high - block.low, 1.0f,
                      matrix + block.low * n_ + section.low, n_, errors, w_.stride, 1.0f,
                      correction_, w_.stride);
  }

  void start_group(const float* matrix, const Section& section, const Block& block) {
    const int64_t columns = block.high - block.group_low;
    const int64_t group = f_.column[static_cast<size_t>(block.group_low)] / w_.group_size;
    float *scale = w_.scale + group * w_.stride, *zero = w_.zero + group * w_.stride;
    note(cuda::begin_group(w_, places_, matrix, block.group_low, block.high,
                           row_of(correction_, block.group_low - section.low), values_, stream_));
    note(choose_scales({values_, FloatType::kFloat32, rows_, columns, 1, w_.stride},
                       {1, columns, rows_}, options_.scales != ScaleChoice::kRange,
                       counts_of(group * w_.group_size), scale, zero));
    note(cuda::round_as_stored(format_, parts_, spans_.count(), rows_, scale, zero, stream_));
  }

  void round_block(const float* matrix, bool again, const Section& section, const Block& block) {
    const int64_t last = block.high - 1 - section.low;
    note(cuda::feed_back(
        w_, encoding_, places_,
        {matrix, block.high, static_cast<int>(block.high - block.low), again,
         row_of(correction_, last), error_, again ? row_of(change_, last) : nullptr, loss_},
        stream_));
  }

  void round_plainly() {
    error_ = gpu_.memory<float>(n_ * rows_);
    note(cuda::round_plainly(w_, encoding_, nullptr, rows_, error_, stream_));
    measure(nullptr);
  }

  // ---- the report: sums over rows, read all at once

  // [rows] losses, [cols] squares by position, then RowLoss of the measured rows, of plain rounding
  // and of what is stored.
  double* begin_report() {
    const int64_t panels = (rows_ + kPanelLanes - 1) / kPanelLanes;
    for (int64_t p : sample_panels(panels, options_.measured_rows)) {
      for (int64_t r = p * kPanelLanes; r < std::min(rows_, (p + 1) * kPanelLanes); ++r)
        measured_.push_back(static_cast<int32_t>(r));
    }
    const auto count = static_cast<int64_t>(measured_.size());
    if (count > 0) measured_rows_ = upload(measured_);
    auto* sums = gpu_.memory<double>(sums_count());
    loss_ = sums;
    squares_ = sums + rows_;
    plain_ = reinterpret_cast<cuda::RowLoss*>(squares_ + n_);
    final_ = plain_ + count;
    note(cuda::clear(sums, 8 * sums_count(), stream_));
    return sums;
  }
  int64_t sums_count() const { return rows_ + n_ + 2 * 3 * static_cast<int64_t>(measured_.size()); }

  // Products of the measured rows with the Hessian: of the errors there, by position, or of plain
  // rounding.
  void measure(const float* error) {
    const auto count = static_cast<int64_t>(measured_.size());
    if (count == 0) return;
    if (!products_) {
      picked_ = gpu_.memory<float>(n_ * count);
      products_ = gpu_.memory<double>(n_ * count);
      if (mean_.fp64) wide_picked_ = gpu_.memory<double>(n_ * count);
    }
    note(error ? cuda::pick_errors(w_, places_, error, measured_rows_, count, picked_, stream_)
               : cuda::round_plainly(w_, encoding_, measured_rows_, count, picked_, stream_));
    if (mean_.fp64) {
      note(cuda::widen(picked_, n_ * count, wide_picked_, stream_));
      gpu_.algebra.gemm64(false, false, n_, count, n_, 1.0, static_cast<const double*>(mean_.data),
                          n_, wide_picked_, count, 0.0, products_, count);
    } else {
      gpu_.algebra.gemm(false, false, n_, count, n_, 1.0f, static_cast<const float*>(mean_.data),
                        n_, picked_, count, 0.0f, reinterpret_cast<float*>(products_), count);
    }
    note(cuda::sum_losses(n_, count, places_, picked_, products_, mean_.fp64, own_,
                          error ? final_ : plain_, stream_));
  }

  std::vector<double> read_losses() {
    std::vector<double> losses(static_cast<size_t>(rows_));
    note(cuda::copy_to_host(losses.data(), loss_, 8 * rows_, stream_));
    return losses;
  }
  static double total(const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0);
  }

  void end_report(const double* sums) {
    if (f_.found) note(cuda::sum_squares(w_, places_, error_, squares_, stream_));
    std::vector<double> all(static_cast<size_t>(sums_count()));
    note(cuda::copy_to_host(all.data(), sums, 8 * sums_count(), stream_));
    const size_t count = measured_.size();
    const auto row_losses = [&](size_t first) {
      std::vector<cuda::RowLoss> losses(count);
      if (count > 0) std::memcpy(losses.data(), &all[first], count * sizeof(cuda::RowLoss));
      cuda::RowLoss sum{};
      for (const cuda::RowLoss& row : losses) {
        sum.loss += row.loss;
        sum.predicted += row.predicted;
        sum.squares += row.squares;
      }
      return sum;
    };
    const auto rows = static_cast<size_t>(rows_), cols = static_cast<size_t>(n_);
    const cuda::RowLoss plain = row_losses(rows + cols),
                        final = row_losses(rows + cols + 3 * count);
    const double times = count > 0 ? static_cast<double>(rows) / static_cast<double>(count) : 0.0;
    GptqReport& r = report_;
    r.damping = f_.damping;
    r.dead = static_cast<double>(f_.dead_count);
    r.fp64 = f_.fp64;
    r.fallback = !f_.found;
    r.measured_rows = static_cast<double>(count);
    r.plain = plain.loss * times;
    r.plain_damped = (plain.loss + f_.added * plain.squares) * times;
    r.predicted = plain.predicted * times;
    if (!f_.found) {
      r.loss = r.plain;
      r.damped = r.feedback = r.measured = r.tracked = r.predicted = r.plain_damped;
      return;
    }
    r.damped = std::accumulate(all.begin(), all.begin() + rows_, 0.0);
    if (options_.sweeps == 0) r.feedback = r.damped;
    r.loss =
        r.damped - f_.added * std::accumulate(all.begin() + rows_, all.begin() + rows_ + n_, 0.0);
    r.measured = final.loss + f_.added * final.squares;
    for (int32_t row : measured_) r.tracked += all[static_cast<size_t>(row)];
  }

  const Gpu& gpu_;
  const cudaStream_t stream_;
  const Format& format_;
  MatrixView source_;  // that scales are chosen for
  const cuda::MeanView mean_;
  const GptqOptions& options_;
  const bool timed_;
  const cuda::FoldBuffers to_;
  const cuda::Spans spans_;
  const cuda::DeviceEncoding encoding_;
  const int64_t n_, rows_;
  GptqReport& report_;
  Status status_;

  std::vector<double> diagonal_;
  Factorization f_;
  std::vector<int32_t> measured_;
  // In the GPU's memory:
  cuda::ColumnPlaces places_{};
  cuda::RoundingMatrix w_{};
  cuda::ScalePart* parts_ = nullptr;
  float *lower_ = nullptr, *hessian_ = nullptr;                          // [cols, cols] by position
  double* own_ = nullptr;                                                // [cols] R_kk by position
  const float* importance_ = nullptr;                                    // [cols]
  float *scale_ = nullptr, *zero_ = nullptr;                             // [spans] as stored
  float* error_ = nullptr;                                               // [cols, rows] by position
  float *correction_ = nullptr, *change_ = nullptr, *values_ = nullptr;  // of a section, a group
  double *loss_ = nullptr, *squares_ = nullptr;
  cuda::RowLoss *plain_ = nullptr, *final_ = nullptr;
  const int32_t* measured_rows_ = nullptr;
  float* picked_ = nullptr;
  double *products_ = nullptr, *wide_picked_ = nullptr;
};

}  // namespace

bool can_solve_on_gpu(const Format& format, const GptqOptions& options) {
  const bool searched_tensor =
      format.grouping == Grouping::kTensor && options.scales != ScaleChoice::kRange;
  return format.family() != Family::kLearnedCodebook && !searched_tensor && options.refits == 0;
}

Status gptq_quantize(const Gpu& gpu, const Format& format, const MatrixView& w,
                     const HessianView& h, const GptqOptions& options, bool timed,
                     void* const* buffers, GptqReport* report) {
  if (Status status = check_gptq(format, w, h.n, options); !status.ok()) return status;
  if (!can_solve_on_gpu(format, options)) {
    return Status::error(StatusCode::kInvalidArgument,
                         format.to_string() + (options.refits > 0 ? " with refits" : "") +
                             " is solved on the CPU only; move weight and Hessian there");
  }
  return GpuGptq(gpu, format, w, h, options, timed, buffers, report).run();
}

}  // namespace bitfold
