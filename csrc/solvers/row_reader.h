// Rows of a float matrix of any dtype and strides, one after the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

inline constexpr int64_t kGrainWeights = 1 << 15;  // folded by a thread, at least

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

// What is said of a weight that is NaN or infinite.
inline Status non_finite_weight(int64_t row, int64_t col, bool is_nan) {
  return Status::error(StatusCode::kNonFinite,
                       "weight[" + std::to_string(row) + ", " + std::to_string(col) + "] is " +
                           (is_nan ? "NaN" : "infinite") + "; every weight must be finite");
}

// Names the first one of a row.
inline Status non_finite_row(const KernelTable& k, const MatrixView& w, int64_t r) {
  RowReader reader(k, w);
  const float* row = reader(r);
  const int64_t col =
      std::find_if(row, row + w.cols, [](float v) { return !std::isfinite(v); }) - row;
  return non_finite_weight(r, col, std::isnan(row[col]));
}

}  // namespace bitfold
