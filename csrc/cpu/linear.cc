#include "cpu/linear.h"

#include <algorithm>

#include "cpu/bfloat16_product.h"
#include "cpu/float_product.h"
#include "cpu/integer_product.h"

namespace bitfold {
namespace {

// Rows of x handled at a time: bounds what is held of a huge batch in another form, and how many go
// the way of floats because one of them holds a NaN.
constexpr int64_t kBatchRows = 512;
// With outliers, which meet rows of x in columns anywhere: so that these stay in the second cache.
constexpr int64_t kBatchRowsOfOutliers = 128;

// From so many rows of x on tiles pay for decoding the weight, which costs what integers take for
// about forty. (Counted in instructions: no such CPU was at hand to measure.)
constexpr int64_t kLeastRowsOfTiles = 64;

bool takes_tiles(const KernelTable& k, int64_t m, Accuracy accuracy) {
  return k.bfloat16 && m >= kLeastRowsOfTiles && accuracy != Accuracy::kFp32;
}

// With operands of fewer digits than float32 has; false where only float32 will do.
bool multiply_narrow(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                     const void* bias, FloatType dtype, Accuracy accuracy, void* y,
                     const Parallel& parallel) {
  if (accuracy == Accuracy::kFp32) return false;
  const auto multiply = takes_tiles(k, m, accuracy) ? multiply_bfloat16 : multiply_integers;
  return multiply(k, w, x, m, bias, dtype, accuracy == Accuracy::kInt8, y, parallel);
}

}  // namespace

void linear(const KernelTable& k, const PackedView& w, const void* x, int64_t m, const void* bias,
            FloatType dtype, void* y, Accuracy accuracy, const Parallel& parallel) {
  const bool transposed = w.outliers.count > 0 && !takes_tiles(k, m, accuracy);
  const int64_t most = transposed ? kBatchRowsOfOutliers : kBatchRows;
  for (int64_t m0 = 0; m0 < m; m0 += most) {
    const int64_t batch = std::min(most, m - m0);
    const void* rows = advance(x, dtype, m0 * w.cols);
    void* out = advance(y, dtype, m0 * w.rows);
    if (!multiply_narrow(k, w, rows, batch, bias, dtype, accuracy, out, parallel)) {
      multiply_floats(k, w, rows, batch, bias, dtype, out, parallel);
    }
  }
}

void linear_grad_input(const KernelTable& k, const PackedView& w, const void* g, int64_t m,
                       FloatType dtype, void* gx, const Parallel& parallel) {
  for (int64_t m0 = 0; m0 < m; m0 += kBatchRows) {
    multiply_floats_transposed(k, w, advance(g, dtype, m0 * w.rows), std::min(kBatchRows, m - m0),
                               dtype, advance(gx, dtype, m0 * w.cols), parallel);
  }
}

}  // namespace bitfold
