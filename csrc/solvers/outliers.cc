#include "solvers/outliers.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/float16.h"
#include "core/scale_coding.h"
#include "solvers/quantize.h"
#include "solvers/row_reader.h"
#include "solvers/scratch_buffers.h"

namespace bitfold {
namespace {

int64_t group_size_of(const Format& format, int64_t cols) {
  return format.grouping == Grouping::kGroup ? format.group_size : cols;
}

MatrixView view_of(const float* data, int64_t rows, int64_t cols) {
  return {data, FloatType::kFloat32, rows, cols, cols, 1};
}

// score[c] = |w[c] - middle of its group|, the middle being the mean without the two extremes,
// which one huge weight does not move. Magnitudes, not squares: those might overflow.
void score_by_distance(const float* w, int64_t n, int64_t group, float* score) {
  for (int64_t begin = 0; begin < n; begin += group) {
    const int64_t end = std::min(begin + group, n), count = end - begin;
    const auto [low, high] = std::minmax_element(w + begin, w + end);
    double sum = std::accumulate(w + begin, w + end, 0.0);
    if (count > 2) sum -= static_cast<double>(*low) + static_cast<double>(*high);
    const auto middle =
        static_cast<float>(sum / static_cast<double>(count > 2 ? count - 2 : count));
    for (int64_t c = begin; c < end; ++c) score[c] = std::fabs(w[c] - middle);
  }
}

// mask = 1 at the `count` largest of n scores, none of them negative: their bits ascend as they do.
// The bit pattern of the last one taken is found in two halves, by counting.
void mark_largest(const float* scores, int64_t n, int64_t count, uint8_t* mask) {
  std::vector<int64_t> bins(1 << 16);
  const auto find = [&](int64_t wanted) {  // the bin in which the wanted-th largest lies
    size_t bin = bins.size() - 1;
    int64_t above = 0;
    while (above + bins[bin] < wanted) above += bins[bin--];
    return std::pair{static_cast<uint32_t>(bin), wanted - above};
  };
  for (int64_t i = 0; i < n; ++i) ++bins[bits_from_float(scores[i]) >> 16];
  const auto [upper, left] = find(count);
  std::fill(bins.begin(), bins.end(), 0);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_from_float(scores[i]);
    if (bits >> 16 == upper) ++bins[bits & 0xffff];
  }
  const auto [lower, at_threshold] = find(left);
  const uint32_t threshold = upper << 16 | lower;
  int64_t ties = at_threshold;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_from_float(scores[i]);
    mask[i] = bits > threshold || (bits == threshold && ties-- > 0);
  }
}

}  // namespace

void set_aside(const KernelTable& k, const Format& format, const MatrixView& w, const uint8_t* mask,
               float* out, const Parallel& parallel) {
  const int64_t group = group_size_of(format, w.cols);
  parallel(w.rows, grain(w.cols, kGrainWeights), [&](int64_t first, int64_t last) {
    RowReader read(k, w);
    for (int64_t r = first; r < last; ++r) {
      const uint8_t* marked = mask + r * w.cols;
      float* row = out + r * w.cols;
      std::copy_n(read(r), w.cols, row);
      for (int64_t begin = 0; begin < w.cols; begin += group) {
        const int64_t end = std::min(begin + group, w.cols);
        if (!std::any_of(marked + begin, marked + end, [](uint8_t m) { return m != 0; })) continue;
        float low = INFINITY, high = -INFINITY;
        for (int64_t c = begin; c < end; ++c) {
          if (marked[c]) continue;
          low = std::min(low, row[c]);
          high = std::max(high, row[c]);
        }
        if (low > high) continue;  // outliers all: among themselves they are none
        for (int64_t c = begin; c < end; ++c)
          if (marked[c]) row[c] = std::clamp(row[c], low, high);
      }
    }
  });
}

Status choose_outliers(const KernelTable& k, const Format& format, Method method,
                       const MatrixView& w, const float* importance, uint8_t* mask,
                       const Parallel& parallel) {
  const Format dense = format.dense();
  const int64_t size = w.rows * w.cols, count = format.outlier_count(w.rows, w.cols);
  const int64_t group = group_size_of(format, w.cols);
  const ScratchBuffers buffers(dense, w.rows, w.cols);
  std::vector<float> factor(static_cast<size_t>(w.cols), 1.0f);
  for (size_t c = 0; importance && c < factor.size(); ++c) factor[c] = std::sqrt(importance[c]);
  std::vector<float> scores(static_cast<size_t>(size));

  // score(row index, row of w, scores of that row) for all rows, then the mask.
  const auto choose = [&](const auto& score) {
    parallel(w.rows, grain(w.cols, kGrainWeights), [&](int64_t first, int64_t last) {
      RowReader read(k, w);
      for (int64_t r = first; r < last; ++r) {
        float* row = scores.data() + r * w.cols;
        score(r, read(r), row);
        for (int64_t c = 0; c < w.cols; ++c) row[c] *= factor[static_cast<size_t>(c)];
      }
    });
    mark_largest(scores.data(), size, count, mask);
  };

  std::atomic<bool> finite{true};
  choose([&](int64_t, const float* row, float* score) {
    float low, high;
    if (!k.stats(row, w.cols, w.cols, &low, &high)) finite = false;
    score_by_distance(row, w.cols, group, score);
  });
  if (!finite) return quantize(k, dense, method, w, buffers.data(), parallel);  // names the place

  // By distance those far out are found, whatever the grid. Without them, what a grid really loses.
  set_aside(k, format, w, mask, scores.data(), parallel);
  const Status status =
      quantize(k, dense, method, view_of(scores.data(), w.rows, w.cols), buffers.data(), parallel);
  if (!status.ok()) return status;
  const PackedView view = make_view(dense, w.rows, w.cols, buffers.data());
  choose([&](int64_t r, const float* row, float* score) {
    k.decode(view, r, 0, w.cols, score);
    for (int64_t c = 0; c < w.cols; ++c) score[c] = std::fabs(row[c] - score[c]);
  });
  return Status::success();
}

Status fill_outliers(const KernelTable& k, const Format& format, const MatrixView& w,
                     const uint8_t* mask, void* const* buffers, const Parallel& parallel) {
  const BufferTable specs = format.buffers(w.rows, w.cols);
  const size_t first_of_outliers = specs.size() - 4;
  auto* halves = static_cast<uint16_t*>(buffers[first_of_outliers]);
  void* columns = buffers[first_of_outliers + 1];
  auto* row_start = static_cast<int32_t*>(buffers[first_of_outliers + 2]);
  auto* exponent = static_cast<int8_t*>(buffers[first_of_outliers + 3]);
  const bool wide = specs[first_of_outliers + 1].dtype == DType::kInt32;

  const int64_t count = format.outlier_count(w.rows, w.cols);
  int64_t found = 0;
  for (int64_t r = 0; r < w.rows; ++r) {
    row_start[r] = static_cast<int32_t>(std::min(found, count));
    const uint8_t* marked = mask + r * w.cols;
    found += std::count_if(marked, marked + w.cols, [](uint8_t m) { return m != 0; });
  }
  row_start[w.rows] = static_cast<int32_t>(count);
  if (found != count) {
    return Status::error(StatusCode::kInvalidArgument,
                         "mask must mark " + std::to_string(count) + " of " +
                             std::to_string(w.rows * w.cols) + " weights for " +
                             format.to_string() + ", got " + std::to_string(found));
  }

  const PackedView dense = make_view(format.dense(), w.rows, w.cols, buffers);
  std::vector<float> values(static_cast<size_t>(count));
  parallel(w.rows, grain(w.cols, kGrainWeights), [&](int64_t first, int64_t last) {
    RowReader read(k, w);
    std::vector<float> decoded(static_cast<size_t>(w.cols));
    for (int64_t r = first; r < last; ++r) {
      int64_t at = row_start[r];
      if (at == row_start[r + 1]) continue;
      const float* row = read(r);
      k.decode(dense, r, 0, w.cols, decoded.data());
      for (int64_t c = 0; c < w.cols; ++c) {
        if (!mask[r * w.cols + c]) continue;
        values[static_cast<size_t>(at)] = row[c] - decoded[static_cast<size_t>(c)];
        if (wide) {
          static_cast<int32_t*>(columns)[at] = static_cast<int32_t>(c);
        } else {
          static_cast<uint16_t*>(columns)[at] = static_cast<uint16_t>(c);
        }
        ++at;
      }
    }
  });
  // Only the largest counts: what is far below it need not keep its digits.
  float largest = 0.0f;
  for (float value : values) largest = std::max(largest, std::fabs(value));
  MagnitudeRange range;
  range.add(&largest, 1);
  const int chosen = choose_exponent(range);
  *exponent = static_cast<int8_t>(chosen);
  encode_halves(values.data(), count, chosen, halves);
  return Status::success();
}

Status quantize_with_outliers(const KernelTable& k, const Format& format, Method method,
                              const MatrixView& w, void* const* buffers, const Parallel& parallel) {
  const auto size = static_cast<size_t>(w.rows * w.cols);
  std::vector<uint8_t> mask(size);
  Status status = choose_outliers(k, format, method, w, nullptr, mask.data(), parallel);
  if (!status.ok()) return status;
  std::vector<float> rest(size);
  set_aside(k, format, w, mask.data(), rest.data(), parallel);
  status =
      quantize(k, format.dense(), method, view_of(rest.data(), w.rows, w.cols), buffers, parallel);
  if (!status.ok()) return status;
  return fill_outliers(k, format, w, mask.data(), buffers, parallel);
}

}  // namespace bitfold
