#include "solvers/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/bitpack.h"
#include "core/float16.h"
#include "core/scale_coding.h"
#include "solvers/group_search.h"
#include "solvers/kmeans.h"
#include "solvers/outliers.h"
#include "solvers/row_reader.h"
#include "solvers/scale_search.h"

namespace bitfold {
namespace {

class Quantizer {
 public:
  Quantizer(const KernelTable& k, const Format& format, Method method, const MatrixView& w,
            void* const* buffers, const Parallel& parallel)
      : k_(k),
        format_(format),
        encoding_{format.bits(), format.family() == Family::kInteger ? format.zero : Zero::kNone,
                  format.element().codebook},
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
    if (format_.family() == Family::kLearnedCodebook) return run_learned();
    scales_.resize(static_cast<size_t>(scale_rows_ * groups_));
    zeros_.resize(scales_.size());
    const bool done = format_.grouping == Grouping::kTensor ? choose_for_tensor() : choose_by_row();
    if (bad_row_ < w_.rows) return describe_bad_row();
    store_scales(done);
    if (done) return Status::success();
    parallel_rows([&](int64_t r, const float* row) {
      if (format_.grouping != Grouping::kTensor) store_zeros(r);
      encode_row(r, row, scales_of(r));
    });
    return Status::success();
  }

 private:
  template <class T>
  T* buffer(BufferRole role) const {
    return static_cast<T*>(buffer_[static_cast<size_t>(role)]);
  }
  int64_t first_scale(int64_t r) const {
    return format_.grouping == Grouping::kTensor ? 0 : r * groups_;
  }
  float* scales_of(int64_t r) { return scales_.data() + first_scale(r); }
  float* zeros_of(int64_t r) { return zeros_.data() + first_scale(r); }

  // body(row index, float row [cols])
  template <class Body>
  void parallel_rows(const Body& body) const {
    parallel_(w_.rows, grain(w_.cols, kGrainWeights), [&](int64_t begin, int64_t end) {
      RowReader row(k_, w_);
      for (int64_t r = begin; r < end; ++r) body(r, row(r));
    });
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

  // A codebook with absmax scales is encoded against the exact absmax, as bitsandbytes does; all
  // else against what a reader will decode.
  bool encodes_exactly() const {
    return format_.family() == Family::kFixedCodebook && method_ == Method::kRound;
  }
  bool stores_halves() const {
    return format_.family() == Family::kInteger && !format_.double_quant;
  }

  // Chooses scales (and zero points) a few rows at a time. A row is encoded at once, while it is in
  // cache, where that needs no other row: not with double quantization, and for fp16 scales in the
  // hope that they need no common power of two. Returns whether all is encoded.
  bool choose_by_row() {
    const bool at_once = encodes_exactly() || !format_.double_quant;
    // For a search as few rows as have a multiple of sixteen spans.
    const int64_t rows = method_ == Method::kRound ? 1 : kSpanLanes / std::gcd(kSpanLanes, groups_);
    std::vector<MagnitudeRange> ranges(static_cast<size_t>(w_.rows));
    parallel_((w_.rows + rows - 1) / rows, grain(w_.cols * rows, kGrainWeights),
              [&](int64_t begin, int64_t end) {
                std::vector<RowReader> readers(static_cast<size_t>(rows), RowReader(k_, w_));
                std::vector<const float*> sources(readers.size());
                SpanSearch search(k_, encoding_, w_.cols, group_size_);
                for (int64_t block = begin; block < end; ++block) {
                  const int64_t first = block * rows;
                  const int64_t count = std::min(rows, w_.rows - first);
                  for (size_t i = 0; i < static_cast<size_t>(count); ++i)
                    sources[i] = readers[i](first + static_cast<int64_t>(i));
                  if (!choose_for_rows(first, count, sources.data(), &search) || !at_once) continue;
                  for (int64_t i = 0; i < count; ++i)
                    ranges[static_cast<size_t>(first + i)] =
                        finish_row(first + i, sources[static_cast<size_t>(i)]);
                }
              });
    for (const MagnitudeRange& range : ranges) scale_range_.add(range);
    return at_once && !(stores_halves() && choose_exponent(scale_range_) != 0);
  }

  // Scales and zero points of the rows [first, first + count); false if a weight is not finite.
  bool choose_for_rows(int64_t first, int64_t count, const float* const* rows, SpanSearch* search) {
    std::vector<float> low(static_cast<size_t>(count * groups_)), high(low.size());
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<size_t>(i * groups_);
      if (k_.stats(rows[i], w_.cols, group_size_, &low[at], &high[at])) continue;
      note_bad_row(first + i);
      finite = false;
    }
    if (!finite) return false;
    if (method_ == Method::kRound) {
      round_scales(k_, encoding_, count * groups_, low.data(), high.data(), scales_of(first),
                   zeros_of(first));
    } else {
      search->run(rows, count, low.data(), high.data(), scales_of(first), zeros_of(first));
    }
    return true;
  }

  // Stores and encodes a row by itself; the range of its scales if they are stored as fp16.
  MagnitudeRange finish_row(int64_t r, const float* row) {
    MagnitudeRange range;
    store_zeros(r);
    if (!stores_halves()) {
      encode_row(r, row, scales_of(r));
      return range;
    }
    range.add(scales_of(r), groups_);
    uint16_t* halves = buffer<uint16_t>(BufferRole::kScale) + r * groups_;
    std::vector<float> stored(static_cast<size_t>(groups_));
    k_.from_float(scales_of(r), groups_, FloatType::kFloat16, halves);
    k_.to_float(halves, FloatType::kFloat16, groups_, stored.data());
    encode_row(r, row, stored.data());
    return range;
  }

  bool choose_for_tensor() {
    std::vector<float> low(static_cast<size_t>(w_.rows)), high(low.size());
    parallel_rows([&](int64_t r, const float* row) {
      const auto at = static_cast<size_t>(r);
      if (!k_.stats(row, w_.cols, w_.cols, &low[at], &high[at])) note_bad_row(r);
    });
    if (bad_row_ < w_.rows) return false;
    float least[kSpanLanes], most[kSpanLanes], scale[kSpanLanes], zero[kSpanLanes];
    std::fill_n(least, kSpanLanes, *std::min_element(low.begin(), low.end()));
    std::fill_n(most, kSpanLanes, *std::max_element(high.begin(), high.end()));
    if (method_ == Method::kRound) {
      round_scales(k_, encoding_, 1, least, most, scale, zero);
    } else {
      search_scales(k_, encoding_, WholeTensor(k_, encoding_, w_, parallel_), least, most, scale,
                    zero);
    }
    scales_[0] = scale[0];
    zeros_[0] = zero[0];
    scale_range_.add(scale, 1);
    return false;
  }

  // Writes the scales, and replaces those in memory by what a reader will decode, unless all codes
  // are chosen (`done`).
  void store_scales(bool done) {
    const auto n = static_cast<int64_t>(scales_.size());
    if (stores_halves()) {
      const int exponent = choose_exponent(scale_range_);
      *buffer<int8_t>(BufferRole::kExponent) = static_cast<int8_t>(exponent);
      if (!done) store_halves(exponent, &scales_, buffer<uint16_t>(BufferRole::kScale));
    } else if (!format_.double_quant) {
      std::copy(scales_.begin(), scales_.end(), buffer<float>(BufferRole::kScale));
    } else {
      auto* codes = buffer<uint8_t>(BufferRole::kScale);
      auto* absmax = buffer<float>(BufferRole::kScaleAbsmax);
      auto* offset = buffer<float>(BufferRole::kScaleOffset);
      double_quantize(scales_.data(), n, codes, absmax, offset, parallel_);
      if (encodes_exactly()) return;
      const std::vector<float> wanted = scales_;
      double_dequantize(codes, absmax, *offset, n, scales_.data());
      if (format_.zero == Zero::kFloat) follow_scales(wanted);
    }
    if (format_.grouping == Grouping::kTensor) store_zeros(0);
  }

  // A real zero point may lie a thousand codes away (a group of equal weights), and would multiply
  // what the 8-bit code of the scale lost: it moves so that the middle of the grid stays where it
  // was.
  void follow_scales(const std::vector<float>& wanted) {
    const float middle = static_cast<float>((1 << format_.bits()) - 1) / 2;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i] == 0.0f || scales_[i] == 0.0f) continue;  // all zeros: code 0 is zero
      zeros_[i] =
          std::clamp(middle - (middle - zeros_[i]) * (wanted[i] / scales_[i]), -65504.0f, 65504.0f);
    }
  }

  // Writes the zero points of a row, and replaces those in memory by what a reader will decode.
  void store_zeros(int64_t r) {
    float* zeros = zeros_of(r);
    if (format_.zero == Zero::kFloat) {
      uint16_t* halves = buffer<uint16_t>(BufferRole::kZero) + first_scale(r);
      k_.from_float(zeros, groups_, FloatType::kFloat16, halves);
      k_.to_float(halves, FloatType::kFloat16, groups_, zeros);
    } else if (format_.zero == Zero::kInt) {
      // Packed like the codes of a row of weights: an integer is its own code.
      const Encoding integers{format_.bits(), Zero::kInt, nullptr};
      const float one = 1.0f, none = 0.0f;
      k_.encode(integers, zeros, groups_, groups_, &one, &none,
                buffer<uint8_t>(BufferRole::kZero) + r * packed_row_bytes(groups_, format_.bits()));
    }
  }

  static void store_halves(int exponent, std::vector<float>* values, uint16_t* halves) {
    const auto n = static_cast<int64_t>(values->size());
    encode_halves(values->data(), n, exponent, halves);
    const float factor = std::ldexp(1.0f, exponent);
    for (size_t i = 0; i < values->size(); ++i) (*values)[i] = half_to_float(halves[i]) * factor;
  }

  void encode_row(int64_t r, const float* row, const float* scale) {
    k_.encode(encoding_, row, w_.cols, group_size_, scale, zeros_of(r),
              buffer<uint8_t>(BufferRole::kCodes) + r * packed_row_bytes(w_.cols, format_.bits()));
  }

  // Learned codebooks, of one row each or of the tensor; their levels are stored as fp16.
  Status run_learned() {
    const int levels = 1 << format_.bits();
    std::vector<float> books(static_cast<size_t>(scale_rows_ * levels));
    format_.grouping == Grouping::kTensor ? learn_for_tensor(&books) : learn_by_row(&books);
    if (bad_row_ < w_.rows) return describe_bad_row();
    MagnitudeRange range;
    range.add(books.data(), static_cast<int64_t>(books.size()));
    const int exponent = choose_exponent(range);
    *buffer<int8_t>(BufferRole::kExponent) = static_cast<int8_t>(exponent);
    store_halves(exponent, &books, buffer<uint16_t>(BufferRole::kCodebook));
    parallel_rows([&](int64_t r, const float* row) {
      const int64_t at = format_.grouping == Grouping::kTensor ? 0 : r * levels;
      const Codebook book = sorted_codebook(books.data() + at, levels);
      const float one = 1.0f;
      k_.encode(
          {format_.bits(), Zero::kNone, &book}, row, w_.cols, w_.cols, &one, nullptr,
          buffer<uint8_t>(BufferRole::kCodes) + r * packed_row_bytes(w_.cols, format_.bits()));
    });
    return Status::success();
  }

  bool is_finite(const float* row) const {
    float low, high;
    return k_.stats(row, w_.cols, w_.cols, &low, &high);
  }

  void learn_for_tensor(std::vector<float>* book) {
    PointHistogram histogram;
    RowReader row(k_, w_);
    for (int64_t r = 0; r < w_.rows; ++r) {
      const float* w = row(r);
      if (!is_finite(w)) return note_bad_row(r);
      histogram.add(w, w_.cols);
    }
    *book = kmeans(histogram.points(), 1 << format_.bits());
  }

  void learn_by_row(std::vector<float>* books) {
    const int levels = 1 << format_.bits();
    parallel_rows([&](int64_t r, const float* row) {
      if (!is_finite(row)) return note_bad_row(r);
      const std::vector<float> found = kmeans(points_of(row, w_.cols), levels);
      std::copy(found.begin(), found.end(), books->begin() + r * levels);
    });
  }

  const KernelTable& k_;
  const Format& format_;
  const Encoding encoding_;
  const Method method_;
  const MatrixView& w_;
  const Parallel& parallel_;
  const int64_t groups_, group_size_, scale_rows_;
  std::array<void*, 7> buffer_{};
  std::vector<float> scales_, zeros_;
  MagnitudeRange scale_range_;  // of what was chosen
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
  if (format.outliers > 0) return quantize_with_outliers(k, format, method, w, buffers, parallel);
  return Quantizer(k, format, method, w, buffers, parallel).run();
}

}  // namespace bitfold
