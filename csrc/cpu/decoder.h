// Weights as floats, whatever there is beside rows of codes: outliers are added, rows picked out of
// panels. What decodes goes through here; for an ordinary weight that costs two comparisons.
#pragma once

#include <vector>

#include "core/view.h"
#include "cpu/kernel_table.h"
#include "cpu/outliers.h"

namespace bitfold {

// One row after another as it is stored, wherever it lies. Kernels decode rows alone.
class RowPicker {
 public:
  explicit RowPicker(const PackedView& w);
  RowPicker(const RowPicker&) = delete;  // view_ refers to row_

  // A view whose codes are right for the columns [col, col + n) of this row, until the next call.
  const PackedView& operator()(int64_t row, int64_t col, int64_t n) {
    if (w_.layout == Layout::kPanels) pick(row, col, n);
    return view_;
  }

 private:
  void pick(int64_t row, int64_t col, int64_t n);

  const PackedView& w_;
  std::vector<uint8_t> row_;
  PackedView view_;  // w_, or its only row, row_
};

// Rows and pieces of rows: KernelTable::decode and decode_row for any weight.
class Decoder {
 public:
  Decoder(const KernelTable& k, const PackedView& w) : k_(k), w_(w), pick_(w), outliers_(k, w) {}

  // out[n] = w[row, col .. col + n); col a multiple of 16.
  void operator()(int64_t row, int64_t col, int64_t n, float* out) {
    k_.decode(pick_(row, col, n), row, col, n, out);
    if (w_.outliers.count > 0) add_outliers(row, col, n, out);
  }
  // The whole row in `dtype`, rounded once; see KernelTable::decode_row.
  void row(int64_t row, FloatType dtype, void* out, bool stream) {
    if (w_.outliers.count == 0)
      return k_.decode_row(pick_(row, 0, w_.cols), row, dtype, out, stream);
    decode_and_round(row, dtype, out);
  }

 private:
  void decode_and_round(int64_t row, FloatType dtype, void* out);
  void add_outliers(int64_t row, int64_t col, int64_t n, float* out);

  const KernelTable& k_;
  const PackedView& w_;
  RowPicker pick_;
  OutlierReader outliers_;
  std::vector<float> row_;
};

}  // namespace bitfold
