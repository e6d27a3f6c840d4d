#include "cpu/decoder.h"

#include <cstring>

namespace bitfold {
namespace {

// to[i] = the i-th piece of one row of a panel, begin <= i < end.
template <class Piece>
void pick_pieces(const uint8_t* panel, int64_t lane, int64_t begin, int64_t end, uint8_t* to) {
  constexpr int64_t kSize = sizeof(Piece);
  for (int64_t i = begin; i < end; ++i)
    memcpy(to + i * kSize, panel + (i * kPanelHeight + lane) * kSize, kSize);
}

}  // namespace

RowPicker::RowPicker(const PackedView& w) : w_(w), view_(w) {
  if (w.layout == Layout::kRows) return;
  row_.resize(static_cast<size_t>(w.row_bytes));
  view_.layout = Layout::kRows;
  view_.codes = row_.data();
  view_.row_bytes = 0;  // every row is this one
}

void RowPicker::pick(int64_t row, int64_t col, int64_t n) {
  const uint8_t* panel = w_.codes + row / kPanelHeight * kPanelHeight * w_.row_bytes;
  const int64_t lane = row % kPanelHeight, end = col + n;
  const int64_t per_word = w_.bits == 3 ? 16 : 32 / w_.bits;
  pick_pieces<uint32_t>(panel, lane, col / per_word, (end + per_word - 1) / per_word, row_.data());
  if (w_.bits == 3)
    pick_pieces<uint16_t>(panel + kPanelHeight * w_.plane_bytes, lane, col / 16, (end + 15) / 16,
                          row_.data() + w_.plane_bytes);
}

void Decoder::add_outliers(int64_t row, int64_t col, int64_t n, float* out) {
  const OutlierReader::Row outliers = outliers_(row);
  for (int64_t i = 0; i < outliers.count; ++i) {
    const int64_t at = outliers.column[i] - col;
    if (at >= 0 && at < n) out[at] += outliers.value[i];
  }
}

void Decoder::decode_and_round(int64_t row, FloatType dtype, void* out) {
  if (dtype == FloatType::kFloat32) return (*this)(row, 0, w_.cols, static_cast<float*>(out));
  row_.resize(static_cast<size_t>(w_.cols));
  (*this)(row, 0, w_.cols, row_.data());
  k_.from_float(row_.data(), w_.cols, dtype, out);
}

}  // namespace bitfold
