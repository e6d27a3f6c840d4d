#include "core/bitpack.h"
#include "core/float16.h"
#include "core/reference/reference.h"

namespace bitfold::reference {

namespace {

float dense_at(const PackedView& view, int64_t row, int64_t col) {
  const unsigned code = extract_code(view.codes + row * view.row_bytes, view.cols, view.bits, col);
  const int64_t group = col / view.group_size;
  const float scale = scale_of(view, row, group);
  if (view.family == Family::kInteger)
    return (static_cast<float>(code) - zero_of(view, row, group)) * scale;
  return level_of(view, row, code) * scale;
}

}  // namespace

void dequantize(const PackedView& view, float* out) {
  for (int64_t r = 0; r < view.rows; ++r) {
    float* row = out + r * view.cols;
    for (int64_t c = 0; c < view.cols; ++c) row[c] = dense_at(view, r, c);
    const auto [begin, end] = outliers_of(view.outliers, r);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = outlier_column(view, i);
      if (c >= 0) row[c] += half_to_float(view.outliers.value[i]) * view.outliers.factor;
    }
  }
}

}  // namespace bitfold::reference
