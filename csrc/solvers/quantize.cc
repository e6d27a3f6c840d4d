#include "solvers/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "core/bitpack.h"
#include "core/float16.h"
#include "core/scale_coding.h"
#include "solvers/kmeans.h"
#include "solvers/scale_search.h"

namespace bitfold {
namespace {

constexpr int64_t kGrainWeights = 1 << 15;

int64_t row_grain(int64_t cols) {
  return std::max<int64_t>(1, kGrainWeights / std::max<int64_t>(1, cols));
}

// Rows of the source as float32; contiguous float32 rows are read in place.
class RowReader {
 public:
  RowReader(const KernelTable& k, const MatrixView& w) : k_(k), w_(w) {
    if (w.dtype != FloatType::kFloat32 || w.col_stride != 1)
      row_.resize(static_cast<size_t>(w.cols));
    if (w.col_stride != 1 && w.dtype != FloatType::kFloat32) gathered_.resize(row_.size());
  }

  const float* operator()(int64_t r) {
    if (w_.dtype == FloatType::kFloat32) {
      const float* source = static_cast<const float*>(w_.data) + r * w_.row_stride;
      if (w_.col_stride == 1) return source;
      for (int64_t c = 0; c < w_.cols; ++c)
        row_[static_cast<size_t>(c)] = source[c * w_.col_stride];
      return row_.data();
    }
    const uint16_t* source = static_cast<const uint16_t*>(w_.data) + r * w_.row_stride;
    if (w_.col_stride != 1) {
      for (int64_t c = 0; c < w_.cols; ++c)
        gathered_[static_cast<size_t>(c)] = source[c * w_.col_stride];
      source = gathered_.data();
    }
    k_.to_float(source, w_.dtype, w_.cols, row_.data());
    return row_.data();
  }

 private:
  const KernelTable& k_;
  const MatrixView& w_;
  std::vector<float> row_;
  std::vector<uint16_t> gathered_;
};

class Quantizer {
 public:
  Quantizer(const KernelTable& k, const Format& format, Method method, const MatrixView& w,
            void* const* buffers, const Parallel& parallel)
      : k_(k),
        format_(format),
        method_(method),
        w_(w),
        parallel_(parallel),
        groups_(format.groups_per_row(w.cols)),
        group_size_(format.grouping == Grouping::kGroup ? format.group_size : w.cols),
        scale_rows_(format.scale_rows(w.rows)),
        bad_row_(w.rows) {
    size_t i = 0;
    for (const BufferSpec& spec : format.buffers(w.rows, w.cols)) {
      buffer_[static_cast<size_t>(spec.role)] = buffers[i++];
    }
  }

  Status run() {
    if (format_.family() == Family::kLearnedCodebook) {
      learn_codebooks();
    } else {
      scales_.resize(static_cast<size_t>(scale_rows_ * groups_));
      zeros_.resize(scales_.size());
      format_.grouping == Grouping::kTensor ? choose_for_tensor() : choose_for_groups();
    }
    if (bad_row_ < w_.rows) return describe_bad_row();
    format_.family() == Family::kLearnedCodebook ? store_codebooks() : store_scales();
    parallel_rows([&](int64_t r, const float* row, uint8_t* codes) { encode_row(r, row, codes); });
    return Status::success();
  }

 private:
  template <class T>
  T* buffer(BufferRole role) const {
    return static_cast<T*>(buffer_[static_cast<size_t>(role)]);
  }

  // body(row index, float row [cols], scratch for cols codes)
  template <class Body>
  void parallel_rows(const Body& body) const {
    parallel_(w_.rows, row_grain(w_.cols), [&](int64_t begin, int64_t end) {
      RowReader row(k_, w_);
      std::vector<uint8_t> codes(static_cast<size_t>(w_.cols));
      for (int64_t r = begin; r < end; ++r) body(r, row(r), codes.data());
    });
  }

  Grid grid(float scale, float zero) const {
    return {scale, zero, static_cast<float>((1 << format_.bits()) - 1)};
  }

  float error(const float* w, int64_t n, const ScaleChoice& c) const {
    if (format_.family() == Family::kInteger) return k_.error_grid(w, n, grid(c.scale, c.zero));
    return k_.error_codebook(w, n, c.scale, *format_.element().codebook);
  }

  SpanFit fit(const float* w, int64_t n, const ScaleChoice& c) const {
    if (format_.family() == Family::kInteger) return k_.fit_grid(w, n, grid(c.scale, c.zero));
    return k_.fit_codebook(w, n, c.scale, *format_.element().codebook);
  }

  void note_bad_row(int64_t r) {
    int64_t seen = bad_row_;
    while (r < seen && !bad_row_.compare_exchange_weak(seen, r)) {
    }
  }

  Status describe_bad_row() const {
    RowReader reader(k_, w_);
    const float* row = reader(bad_row_);
    const int64_t col =
        std::find_if(row, row + w_.cols, [](float v) { return !std::isfinite(v); }) - row;
    return Status::error(StatusCode::kNonFinite, "weight[" + std::to_string(bad_row_) + ", " +
                                                     std::to_string(col) + "] is " +
                                                     (std::isnan(row[col]) ? "NaN" : "infinite") +
                                                     "; every weight must be finite");
  }

  void choose_for_groups() {
    parallel_rows([&](int64_t r, const float* row, uint8_t*) {
      for (int64_t g = 0; g < groups_; ++g) {
        const float* w = row + g * group_size_;
        const int64_t n = std::min(group_size_, w_.cols - g * group_size_);
        const SpanStats stats = k_.stats(w, n);
        if (!stats.finite) return note_bad_row(r);
        set(r * groups_ + g, choose(stats, n,
                                    {[&](const ScaleChoice& c) { return error(w, n, c); },
                                     [&](const ScaleChoice& c) { return fit(w, n, c); }}));
      }
    });
  }

  void choose_for_tensor() {
    // Sums per row first, then over rows in order: the same result for every number of threads.
    std::vector<SpanStats> row_stats(static_cast<size_t>(w_.rows));
    parallel_rows([&](int64_t r, const float* row, uint8_t*) {
      row_stats[static_cast<size_t>(r)] = k_.stats(row, w_.cols);
      if (!row_stats[static_cast<size_t>(r)].finite) note_bad_row(r);
    });
    if (bad_row_ < w_.rows) return;
    SpanStats stats = row_stats[0];
    double sum = 0.0;
    for (const SpanStats& one : row_stats) {
      stats.min = std::min(stats.min, one.min);
      stats.max = std::max(stats.max, one.max);
      sum += one.sum;
    }
    stats.sum = static_cast<float>(sum);
    GroupProbe probe;
    std::vector<float> row_errors(row_stats.size());
    probe.error = [&](const ScaleChoice& c) {
      parallel_rows([&](int64_t r, const float* row, uint8_t*) {
        row_errors[static_cast<size_t>(r)] = error(row, w_.cols, c);
      });
      double total = 0.0;
      for (float one : row_errors) total += one;
      return static_cast<float>(total);
    };
    std::vector<SpanFit> row_fits(row_stats.size());
    probe.fit = [&](const ScaleChoice& c) {
      parallel_rows([&](int64_t r, const float* row, uint8_t*) {
        row_fits[static_cast<size_t>(r)] = fit(row, w_.cols, c);
      });
      double wd = 0.0, dd = 0.0, d = 0.0;
      for (const SpanFit& one : row_fits) {
        wd += one.wd;
        dd += one.dd;
        d += one.d;
      }
      return SpanFit{static_cast<float>(wd), static_cast<float>(dd), static_cast<float>(d)};
    };
    set(0, choose(stats, w_.rows * w_.cols, probe));
  }

  ScaleChoice choose(const SpanStats& stats, int64_t n, const GroupProbe& probe) const {
    return method_ == Method::kRound ? round_scale(format_, stats)
                                     : search_scale(format_, stats, n, probe);
  }

  void set(int64_t at, const ScaleChoice& choice) {
    scales_[static_cast<size_t>(at)] = choice.scale;
    zeros_[static_cast<size_t>(at)] = choice.zero;
  }

  // Writes scales and zero points, and replaces those in memory by what a reader will decode, so
  // that codes are chosen against the stored values. The exception: a codebook with absmax scales
  // keeps the exact absmax, as bitsandbytes does.
  void store_scales() {
    const auto n = static_cast<int64_t>(scales_.size());
    const bool exact = format_.family() == Family::kFixedCodebook && method_ == Method::kRound;
    const std::vector<float> chosen = exact ? scales_ : std::vector<float>();
    if (format_.double_quant) {
      auto* codes = buffer<uint8_t>(BufferRole::kScale);
      auto* absmax = buffer<float>(BufferRole::kScaleAbsmax);
      auto* offset = buffer<float>(BufferRole::kScaleOffset);
      const std::vector<float> wanted =
          format_.zero == Zero::kFloat ? scales_ : std::vector<float>();
      double_quantize(scales_.data(), n, codes, absmax, offset);
      double_dequantize(codes, absmax, *offset, n, scales_.data());
      // A real zero point may lie a thousand codes away (a group of equal weights), and would
      // multiply what the scale lost: it moves so that the middle of the grid stays where it was.
      const float middle = static_cast<float>((1 << format_.bits()) - 1) / 2;
      for (size_t i = 0; i < wanted.size(); ++i) {
        if (wanted[i] == 0.0f || scales_[i] == 0.0f) continue;  // all zeros: code 0 is zero
        zeros_[i] = std::clamp(middle - (middle - zeros_[i]) * (wanted[i] / scales_[i]), -65504.0f,
                               65504.0f);
      }
    } else if (format_.family() == Family::kInteger) {
      store_halves(&scales_, buffer<uint16_t>(BufferRole::kScale));
    } else {
      std::copy(scales_.begin(), scales_.end(), buffer<float>(BufferRole::kScale));
    }
    if (exact) scales_ = chosen;

    if (format_.zero == Zero::kFloat) {
      auto* halves = buffer<uint16_t>(BufferRole::kZero);
      encode_halves(zeros_.data(), n, 0, halves);
      for (size_t i = 0; i < zeros_.size(); ++i) zeros_[i] = half_to_float(halves[i]);
    } else if (format_.zero == Zero::kInt) {
      const int64_t bytes = packed_row_bytes(groups_, format_.bits());
      std::vector<uint8_t> codes(static_cast<size_t>(groups_));
      for (int64_t r = 0; r < scale_rows_; ++r) {
        for (int64_t g = 0; g < groups_; ++g) {
          codes[static_cast<size_t>(g)] =
              static_cast<uint8_t>(zeros_[static_cast<size_t>(r * groups_ + g)]);
        }
        pack_row(codes.data(), groups_, format_.bits(),
                 buffer<uint8_t>(BufferRole::kZero) + r * bytes);
      }
    }
  }

  void store_halves(std::vector<float>* values, uint16_t* halves) const {
    const auto n = static_cast<int64_t>(values->size());
    const int exponent = choose_exponent(values->data(), n);
    *buffer<int8_t>(BufferRole::kExponent) = static_cast<int8_t>(exponent);
    encode_halves(values->data(), n, exponent, halves);
    const float factor = std::ldexp(1.0f, exponent);
    for (size_t i = 0; i < values->size(); ++i) (*values)[i] = half_to_float(halves[i]) * factor;
  }

  void learn_codebooks() {
    const int levels = 1 << format_.bits();
    scales_.resize(static_cast<size_t>(scale_rows_ * levels));  // here: the levels of each codebook
    if (format_.grouping == Grouping::kTensor) {
      PointHistogram histogram;
      RowReader row(k_, w_);
      for (int64_t r = 0; r < w_.rows; ++r) {
        const float* w = row(r);
        if (!k_.stats(w, w_.cols).finite) return note_bad_row(r);
        histogram.add(w, w_.cols);
      }
      scales_ = kmeans(histogram.points(), levels);
      return;
    }
    parallel_rows([&](int64_t r, const float* row, uint8_t*) {
      if (!k_.stats(row, w_.cols).finite) return note_bad_row(r);
      const std::vector<float> found = kmeans(points_of(row, w_.cols), levels);
      std::copy(found.begin(), found.end(), scales_.begin() + r * levels);
    });
  }

  void store_codebooks() { store_halves(&scales_, buffer<uint16_t>(BufferRole::kCodebook)); }

  void encode_row(int64_t r, const float* row, uint8_t* codes) const {
    const int bits = format_.bits();
    const int64_t scale_row = format_.grouping == Grouping::kTensor ? 0 : r;
    if (format_.family() == Family::kLearnedCodebook) {
      const float* levels = scales_.data() + (scale_row << bits);
      k_.encode_codebook(row, w_.cols, 1.0f, sorted_codebook(levels, 1 << bits), codes);
    } else {
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t at = g * group_size_;
        const int64_t n = std::min(group_size_, w_.cols - at);
        const float scale = scales_[static_cast<size_t>(scale_row * groups_ + g)];
        if (format_.family() == Family::kInteger) {
          const float zero = zeros_[static_cast<size_t>(scale_row * groups_ + g)];
          k_.encode_grid(row + at, n, grid(scale, zero), codes + at);
        } else {
          k_.encode_codebook(row + at, n, scale, *format_.element().codebook, codes + at);
        }
      }
    }
    pack_row(codes, w_.cols, bits,
             buffer<uint8_t>(BufferRole::kCodes) + r * packed_row_bytes(w_.cols, bits));
  }

  const KernelTable& k_;
  const Format& format_;
  const Method method_;
  const MatrixView& w_;
  const Parallel& parallel_;
  const int64_t groups_, group_size_, scale_rows_;
  std::array<void*, 7> buffer_{};
  std::vector<float> scales_, zeros_;
  std::atomic<int64_t> bad_row_;
};

}  // namespace

Status quantize(const KernelTable& k, const Format& format, Method method, const MatrixView& w,
                void* const* buffers, const Parallel& parallel) {
  if (w.rows <= 0 || w.cols <= 0) {
    return Status::error(StatusCode::kInvalidArgument,
                         "weight must have at least one row and one column, got [" +
                             std::to_string(w.rows) + ", " + std::to_string(w.cols) + "]");
  }
  return Quantizer(k, format, method, w, buffers, parallel).run();
}

}  // namespace bitfold
