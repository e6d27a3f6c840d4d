#include "cpu/outliers.h"

#include <algorithm>

namespace bitfold {
namespace {

// Columns of x that are turned over at once: a line of the cache each.
constexpr int64_t kTransposedCols = 64;
constexpr int64_t kGrainElements = 1 << 16;

template <class Column>
void read_columns(const void* source, int64_t begin, int64_t n, int64_t cols, int32_t* column,
                  float* value) {
  const Column* from = static_cast<const Column*>(source) + begin;
  for (int64_t i = 0; i < n; ++i) {
    const bool good = from[i] >= 0 && from[i] < cols;
    column[i] = good ? static_cast<int32_t>(from[i]) : 0;
    value[i] = good ? value[i] : 0.0f;
  }
}

}  // namespace

OutlierReader::Row OutlierReader::operator()(int64_t row) {
  const OutlierView& outliers = w_.outliers;
  const auto [begin, end] = outliers_of(outliers, row);
  const int64_t n = end - begin;
  if (static_cast<size_t>(n) > value_.size()) {
    value_.resize(static_cast<size_t>(n));
    column_.resize(value_.size());
  }
  k_.to_float(outliers.value + begin, FloatType::kFloat16, n, value_.data());
  if (outliers.wide) {
    read_columns<int32_t>(outliers.column, begin, n, w_.cols, column_.data(), value_.data());
  } else {
    read_columns<uint16_t>(outliers.column, begin, n, w_.cols, column_.data(), value_.data());
  }
  for (int64_t i = 0; i < n; ++i) value_[static_cast<size_t>(i)] *= outliers.factor;
  return {value_.data(), column_.data(), n};
}

OutlierProduct::OutlierProduct(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                               FloatType dtype, const Parallel& parallel)
    : k_(k), w_(w), m_(m) {
  if (w.outliers.count == 0) return;
  if (m == 1 && dtype == FloatType::kFloat32) {
    x_ = static_cast<const float*>(x);
    return;
  }
  // Few rows of x fill one vector, more of them whole groups of vectors.
  if (m > 1) ldx_ = m <= 16 ? 16 : (m + kOutlierLanes - 1) / kOutlierLanes * kOutlierLanes;
  copy_.resize(static_cast<size_t>(ldx_ * w.cols));
  x_ = copy_.data();
  const int64_t blocks = (w.cols + kTransposedCols - 1) / kTransposedCols;
  parallel(blocks, grain(m * kTransposedCols, kGrainElements), [&](int64_t begin, int64_t end) {
    float part[kTransposedCols];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col = block * kTransposedCols, n = std::min(kTransposedCols, w.cols - col);
      float* to = copy_.data() + col * ldx_;
      for (int64_t i = 0; i < m; ++i) {
        k.to_float(advance(x, dtype, i * w.cols + col), dtype, n, part);
        for (int64_t j = 0; j < n; ++j) to[j * ldx_ + i] = part[j];
      }
    }
  });
}

void OutlierProduct::add_rows(int64_t row, int64_t n, float* y, int64_t ldy) const {
  for (int64_t r = 0; r < n; ++r) {
    const auto [begin, end] = outliers_of(w_.outliers, row + r);
    k_.add_outliers(w_.outliers, begin, end, w_.cols, x_, ldx_, m_, y + r, ldy);
  }
}

}  // namespace bitfold
