#include "cpu/mixed_product.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace bitfold {
namespace {

// What a thread should have to do, in multiply-adds, or starting it costs more than it saves.
constexpr int64_t kGrainWork = 1 << 18;
constexpr int64_t kScanCols = 512;  // columns of x that are searched at once
constexpr int64_t kWeightRows = 64;
constexpr int64_t kBatchRows = 512;  // of x at a time: what threads hold is this times kWeightRows
// 255 * 127 times this is below 2^31: as many columns as a 32-bit sum holds.
constexpr int64_t kExactCols = 65536;

std::vector<int64_t> columns_above(const KernelTable& k, const void* x, int64_t m, int64_t cols,
                                   FloatType dtype, float threshold, const Parallel& parallel) {
  std::vector<uint8_t> above(static_cast<size_t>(cols));
  const int64_t blocks = (cols + kScanCols - 1) / kScanCols;
  parallel(blocks, grain(4 * m * kScanCols, kGrainWork), [&](int64_t begin, int64_t end) {
    float part[kScanCols];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col = block * kScanCols, n = std::min(kScanCols, cols - col);
      uint8_t* flags = above.data() + col;
      for (int64_t i = 0; i < m; ++i) {
        k.to_float(advance(x, dtype, i * cols + col), dtype, n, part);
        for (int64_t j = 0; j < n; ++j)  // true for NaN
          flags[j] = flags[j] | static_cast<uint8_t>(!(std::fabs(part[j]) <= threshold));
      }
    }
  });
  std::vector<int64_t> found;
  for (int64_t c = 0; c < cols; ++c)
    if (above[static_cast<size_t>(c)]) found.push_back(c);
  return found;
}

// x as integers with a scale per row, outlier columns zero, and those as floats.
struct MixedActivations {
  int64_t row_bytes;          // of q: a whole number of vectors, zero behind the last column
  std::vector<int8_t> q;      // [m, row_bytes]
  std::vector<float> step;    // [m]: x = step * q
  std::vector<int64_t> sum;   // [m]: sum of q
  std::vector<float> floats;  // [m, columns.size()]
};

// One row [n] of x, outliers set to zero.
void quantize_row(const KernelTable& k, const float* x, int64_t n, int8_t* q, float* step,
                  int64_t* sum) {
  float low, high;
  if (!k.stats(x, n, n, &low, &high)) {
    *step = NAN;
    return;
  }
  const float largest = std::max(high, -low), inverse = 127.0f / largest;
  if (!(inverse < INFINITY)) return;  // nothing but zeros, or as good as that
  *step = largest / 127.0f;
  int64_t total = 0;
  for (int64_t c = 0; c < n; ++c) {
    constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to even
    q[c] = static_cast<int8_t>(static_cast<int32_t>((x[c] * inverse + kToInteger) - kToInteger));
    total += q[c];
  }
  *sum = total;
}

MixedActivations quantize_mixed(const KernelTable& k, const void* x, int64_t m, int64_t cols,
                                FloatType dtype, const int64_t* columns, int64_t count,
                                const Parallel& parallel) {
  MixedActivations a;
  a.row_bytes = (cols + 63) / 64 * 64;
  a.q.resize(static_cast<size_t>(m * a.row_bytes));
  a.step.resize(static_cast<size_t>(m));
  a.sum.resize(static_cast<size_t>(m));
  a.floats.resize(static_cast<size_t>(m * count));
  parallel(m, grain(16 * cols, kGrainWork), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(cols));
    for (int64_t i = begin; i < end; ++i) {
      k.to_float(advance(x, dtype, i * cols), dtype, cols, row.data());
      float* kept = a.floats.data() + i * count;
      for (int64_t j = 0; j < count; ++j)
        kept[j] = std::exchange(row[static_cast<size_t>(columns[j])], 0.0f);
      const auto at = static_cast<size_t>(i);
      quantize_row(k, row.data(), cols, a.q.data() + i * a.row_bytes, &a.step[at], &a.sum[at]);
    }
  });
  return a;
}

// Some rows of x; bias as floats.
void multiply_rows(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                   const float* bias, FloatType dtype, const int64_t* columns, int64_t count,
                   void* y, const Parallel& parallel) {
  const MixedActivations a = quantize_mixed(k, x, m, w.cols, dtype, columns, count, parallel);
  const int64_t blocks = (w.rows + kWeightRows - 1) / kWeightRows;
  parallel(blocks, grain(m * kWeightRows * w.cols, kGrainWork), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> part(static_cast<size_t>(m * kWeightRows));
    std::vector<int64_t> integers(part.size());
    std::vector<float> floats(part.size()), weight(static_cast<size_t>(kWeightRows * count));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t r0 = block * kWeightRows, n = std::min(kWeightRows, w.rows - r0);
      std::fill(integers.begin(), integers.end(), 0);
      for (int64_t c = 0; c < w.cols; c += kExactCols) {
        k.dot_codes(w.codes + r0 * w.row_bytes + c, w.row_bytes, n, a.q.data() + c, a.row_bytes, m,
                    std::min(kExactCols, w.cols - c), part.data(), kWeightRows);
        for (size_t i = 0; i < part.size(); ++i) integers[i] += part[i];
      }
      float scale[kWeightRows];
      for (int64_t r = 0; r < n; ++r) {
        scale[r] = scale_of(w, r0 + r, 0);
        const uint8_t* codes = w.codes + (r0 + r) * w.row_bytes;
        for (int64_t j = 0; j < count; ++j)
          weight[static_cast<size_t>(r * count + j)] =
              (static_cast<float>(codes[columns[j]]) - 128.0f) * scale[r];
      }
      for (int64_t i = 0; i < m; ++i) {
        const auto at = static_cast<size_t>(i);
        for (int64_t r = 0; r < n; ++r) {
          const size_t out = at * kWeightRows + static_cast<size_t>(r);
          const auto centred = static_cast<float>(integers[out] - 128 * a.sum[at]);
          floats[out] =
              centred * (a.step[at] * scale[r]) + (bias ? bias[static_cast<size_t>(r0 + r)] : 0.0f);
        }
      }
      if (count > 0)
        k.gemm_nt(a.floats.data(), count, weight.data(), count, floats.data(), kWeightRows, m, n,
                  count);
      k.rows_from_float(floats.data(), kWeightRows, m, n, dtype, advance(y, dtype, r0), w.rows);
    }
  });
}

}  // namespace

bool suits_mixed_product(const Format& format) {
  return format.family() == Family::kInteger && format.bits() == 8 && format.zero == Zero::kNone &&
         format.grouping != Grouping::kGroup && format.outliers == 0;
}

void multiply_mixed(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                    const void* bias, FloatType dtype, const MixedColumns& chosen, void* y,
                    const Parallel& parallel) {
  std::vector<int64_t> found;
  if (!chosen.fixed) found = columns_above(k, x, m, w.cols, dtype, chosen.threshold, parallel);
  const int64_t* columns = chosen.fixed ? chosen.columns : found.data();
  const int64_t count = chosen.fixed ? chosen.count : static_cast<int64_t>(found.size());
  std::vector<float> bias_f(static_cast<size_t>(bias ? w.rows : 0));
  if (bias) k.to_float(bias, dtype, w.rows, bias_f.data());
  for (int64_t i = 0; i < m; i += kBatchRows) {
    multiply_rows(k, w, advance(x, dtype, i * w.cols), std::min(kBatchRows, m - i),
                  bias ? bias_f.data() : nullptr, dtype, columns, count,
                  advance(y, dtype, i * w.rows), parallel);
  }
}

}  // namespace bitfold
