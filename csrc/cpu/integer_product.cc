#include "cpu/integer_product.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/outliers.h"
#include "cpu/scratch.h"

namespace bitfold {
namespace {

// What a thread should have to do, in multiply-adds, or starting it costs more than it saves.
constexpr int64_t kGrainWork = 1 << 18;

// From so many rows of x on, what it takes to scale words is less than what it saves (measured).
constexpr int64_t kLeastRowsAcross = 64;

// y[i, 0..n) = bias or zero, for every row of x; y is [m, ldy].
void begin_sums(const float* bias, int64_t m, int64_t n, float* y, int64_t ldy) {
  if (!bias) std::fill_n(y, m * ldy, 0.0f);
  for (int64_t i = 0; bias && i < m; ++i) std::copy_n(bias, n, y + i * ldy);
}

// Whether integers up to kLevelLimit stand for learned levels well enough. k-means puts a level on
// an outlier, however far, and the others would share what steps are left: at most half of them may
// lie below a quarter of the largest. (Gaussian weights: 6 of 16. Fixed codebooks are all well
// within.)
bool levels_fit(const KernelTable& k, const PackedView& w) {
  if (w.family != Family::kLearnedCodebook) return true;
  const int64_t books = w.scale_row_stride == 0 ? 1 : w.rows, count = int64_t{1} << w.bits;
  float levels[kMaxLevels];
  for (int64_t book = 0; book < books; ++book) {
    k.to_float(w.codebook + book * count, FloatType::kFloat16, count, levels);
    float largest = 0.0f, sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      levels[i] = std::fabs(levels[i]);
      sum += levels[i];
      largest = std::max(largest, levels[i]);
    }
    int64_t small = 0;
    for (int64_t i = 0; i < count; ++i) small += levels[i] < largest / 4;
    const bool finite_and_not_tiny = sum * w.factor > 1e-25f && sum * w.factor < 1e30f;
    // Zeros fit, and NaN, which is not above zero either, does not.
    if (sum != 0.0f && !(finite_and_not_tiny && small <= count / 2)) return false;
  }
  return true;
}

}  // namespace

bool sums_across_groups(FloatType dtype, int64_t m) {
  return dtype == FloatType::kBFloat16 && m >= kLeastRowsAcross;
}

bool multiply_integers(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                       const void* bias, FloatType dtype, bool eight_bits, void* y,
                       const Parallel& parallel) {
  if (!levels_fit(k, w)) return false;
  const bool walks_rows = m <= k.walked_rows && w.layout == Layout::kRows;
  const Walk walk = walks_rows ? Walk::kRows : Walk::kPanels;
  // Codes as bytes need no table and no widening; for more rows a product of words costs no more
  // and needs half the sums.
  const bool codes_suffice = walks_rows && m == 1 && w.family == Family::kInteger;
  const Operand operand = eight_bits      ? Operand::kBytes
                          : codes_suffice ? Operand::kTwoBytes
                                          : Operand::kWords;
  const bool across_groups = operand == Operand::kWords && sums_across_groups(dtype, m);
  Activations xs = describe_activations(w, operand, walk, m, across_groups);
  const int64_t data_bytes = (xs.blocks * m * xs.layout->block_bytes + 63) / 64 * 64;
  const Scratch activations(data_bytes + 2 * m * xs.units * 4 + (bias ? w.rows * 4 : 0) + xs.units);
  xs.data = activations.data();
  xs.scale = reinterpret_cast<float*>(activations.data() + data_bytes);
  xs.sum = xs.scale + m * xs.units;
  float* bias_f = bias ? xs.sum + m * xs.units : nullptr;
  if (bias) k.to_float(bias, dtype, w.rows, bias_f);
  if (across_groups) {
    xs.shared = reinterpret_cast<uint8_t*>(xs.sum + m * xs.units + (bias ? w.rows : 0));
    k.mark_shared_spans(w, xs);
  }

  std::atomic<bool> fits{true};
  parallel(m, grain(16 * w.cols, kGrainWork), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!k.quantize_activations(advance(x, dtype, i * w.cols), dtype, i, &xs)) fits = false;
    }
  });
  if (!fits) return false;
  const OutlierProduct outliers(k, w, x, m, dtype, parallel);

  // Rows [r, r + n) of w, computed as floats [m, ldy], become columns of y.
  const auto finish = [&](const float* sums, int64_t ldy, int64_t r, int64_t n) {
    k.rows_from_float(sums, ldy, m, n, dtype, advance(y, dtype, r), w.rows);
  };
  if (walks_rows) {
    parallel(w.rows, grain(m * w.cols, kGrainWork), [&](int64_t begin, int64_t end) {
      const int64_t scratch_bytes = k.rows_scratch_bytes(w, xs);
      const int64_t n = end - begin;
      const Scratch scratch(scratch_bytes + m * n * 4);
      float* sums = reinterpret_cast<float*>(scratch.data() + scratch_bytes);
      begin_sums(bias ? bias_f + begin : nullptr, m, n, sums, n);
      outliers.add(begin, n, sums, n);
      k.multiply_rows(w, xs, begin, end, scratch.data(), sums, n);
      finish(sums, n, begin, n);
    });
    return true;
  }
  const int64_t width = k.panel_rows;
  parallel((w.rows + width - 1) / width, grain(m * width * w.cols, kGrainWork),
           [&](int64_t begin, int64_t end) {
             const int64_t scratch_bytes = k.panel_scratch_bytes(w, xs);
             const Scratch scratch(scratch_bytes + m * width * 4);
             float* sums = reinterpret_cast<float*>(scratch.data() + scratch_bytes);
             for (int64_t panel = begin; panel < end; ++panel) {
               const int64_t r = panel * width;
               const int64_t n = std::min(width, w.rows - r);
               begin_sums(bias ? bias_f + r : nullptr, m, n, sums, width);
               outliers.add(r, n, sums, width);
               k.multiply_panel(w, xs, r, scratch.data(), sums);
               finish(sums, width, r, n);
             }
           });
  return true;
}

}  // namespace bitfold
