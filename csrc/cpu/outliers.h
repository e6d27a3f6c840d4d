// The sparse part of a weight: fp16 values that the format option `outliers` adds to what the codes
// stand for. Kernels know codes alone: products add the values here, decoding does in decoder.h. A
// weight without outliers pays one comparison.
#pragma once

#include <vector>

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// The outliers of one row after another as floats and columns. Rows and columns are brought within
// the weight, so that bytes that lie lead to wrong numbers and not beyond a buffer.
class OutlierReader {
 public:
  OutlierReader(const KernelTable& k, const PackedView& w) : k_(k), w_(w) {}

  struct Row {
    const float* value;
    const int32_t* column;  // within [0, w.cols); the value is 0 where the stored one was not
    int64_t count;
  };
  Row operator()(int64_t row);  // valid until the next call

 private:
  const KernelTable& k_;
  const PackedView& w_;
  std::vector<float> value_;
  std::vector<int32_t> column_;
};

// The product of activations with the sparse part alone, in float32.
class OutlierProduct {
 public:
  // x [m, w.cols] contiguous. Holds a transposed copy of it, if w has outliers at all.
  OutlierProduct(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                 FloatType dtype, const Parallel& parallel);

  // y[i * ldy + r] += the outliers of w[row + r] . x[i] for r < n, i < m.
  void add(int64_t row, int64_t n, float* y, int64_t ldy) const {
    if (w_.outliers.count > 0) add_rows(row, n, y, ldy);
  }

 private:
  void add_rows(int64_t row, int64_t n, float* y, int64_t ldy) const;

  const KernelTable& k_;
  const PackedView& w_;
  int64_t m_;
  int64_t ldx_ = 1;
  const float* x_ = nullptr;  // [cols, ldx_]: the rows of x that meet a weight lie together
  std::vector<float> copy_;
};

}  // namespace bitfold
