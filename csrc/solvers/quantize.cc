#include "solvers/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/scale_coding.h"
#include "solvers/group_search.h"
#include "solvers/kmeans.h"
#include "solvers/row_reader.h"
#include "solvers/scale_search.h"
#include "solvers/scale_storage.h"

namespace bitfold {
namespace {

class Quantizer {
 public:
  Quantizer(const KernelTable& k, const Format& format, Method method, const MatrixView& w,
            void* const* buffers, const Parallel& parallel)
      : k_(k),
        format_(format),
        encoding_(encoding_of(format)),
        storage_(k, format, w.rows, w.cols, buffers, parallel),
        method_(method),
        w_(w),
        parallel_(parallel),
        groups_(format.groups_per_row(w.cols)),
        group_size_(format.grouping == Grouping::kGroup ? format.group_size : w.cols),
        scale_rows_(format.scale_rows(w.rows)),
        bad_row_(w.rows) {}

  Status run() {
    if (format_.family() == Family::kLearnedCodebook) return run_learned();
    scales_.resize(static_cast<size_t>(scale_rows_ * groups_));
    zeros_.resize(scales_.size());
    const bool done = format_.grouping == Grouping::kTensor ? choose_for_tensor() : choose_by_row();
    if (bad_row_ < w_.rows) return non_finite_row(k_, w_, bad_row_);
    store_scales(done);
    if (done) return Status::success();
    parallel_rows([&](int64_t r, const float* row) {
      if (format_.grouping != Grouping::kTensor) storage_.store_zeros(r, zeros_of(r));
      encode_row(r, row, scales_of(r));
    });
    return Status::success();
  }

 private:
  float* scales_of(int64_t r) { return scales_.data() + storage_.first_scale(r); }
  float* zeros_of(int64_t r) { return zeros_.data() + storage_.first_scale(r); }

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

  // A codebook with absmax scales is encoded against the exact absmax, as bitsandbytes does; all
  // else against what a reader will decode.
  bool encodes_exactly() const {
    return format_.family() == Family::kFixedCodebook && method_ == Method::kRound;
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
    return at_once && !(storage_.stores_halves() && choose_exponent(scale_range_) != 0);
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
    storage_.store_zeros(r, zeros_of(r));
    if (!storage_.stores_halves()) {
      encode_row(r, row, scales_of(r));
      return range;
    }
    range.add(scales_of(r), groups_);
    uint16_t* halves = storage_.buffer<uint16_t>(BufferRole::kScale) + r * groups_;
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

  void store_scales(bool done) {
    const int exponent = choose_exponent(scale_range_);
    if (done && storage_.stores_halves()) {
      storage_.store_exponent(exponent);
    } else {
      storage_.store_scales(exponent, &scales_, &zeros_, /*replace=*/!encodes_exactly());
    }
    if (format_.grouping == Grouping::kTensor) storage_.store_zeros(0, zeros_.data());
  }

  void encode_row(int64_t r, const float* row, const float* scale) {
    k_.encode(encoding_, row, w_.cols, group_size_, scale, zeros_of(r), storage_.codes_of(r));
  }

  // Learned codebooks, of one row each or of the tensor; their levels are stored as fp16.
  Status run_learned() {
    const int levels = 1 << format_.bits();
    std::vector<float> books(static_cast<size_t>(scale_rows_ * levels));
    format_.grouping == Grouping::kTensor ? learn_for_tensor(&books) : learn_by_row(&books);
    if (bad_row_ < w_.rows) return non_finite_row(k_, w_, bad_row_);
    storage_.store_books(&books);
    parallel_rows([&](int64_t r, const float* row) {
      const int64_t at = format_.grouping == Grouping::kTensor ? 0 : r * levels;
      const Codebook book = sorted_codebook(books.data() + at, levels);
      const float one = 1.0f;
      k_.encode({format_.bits(), Zero::kNone, &book}, row, w_.cols, w_.cols, &one, nullptr,
                storage_.codes_of(r));
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
  ScaleStorage storage_;
  const Method method_;
  const MatrixView& w_;
  const Parallel& parallel_;
  const int64_t groups_, group_size_, scale_rows_;
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
  return Quantizer(k, format, method, w, buffers, parallel).run();
}

}  // namespace bitfold
