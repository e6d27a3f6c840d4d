#include "cpu/dequantize.h"

#include <algorithm>

namespace bitfold {
namespace {

constexpr int64_t kPieceCols = 512;  // a row on its way to half or bfloat16

// A range handed to one thread should decode at least this many weights, or starting it costs more
// than it saves.
constexpr int64_t kGrainWeights = 1 << 16;

int64_t row_grain(int64_t cols) {
  return std::max<int64_t>(1, kGrainWeights / std::max<int64_t>(1, cols));
}

void* advance(void* data, FloatType dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * (dtype == FloatType::kFloat32 ? 4 : 2);
}

// One row of the result, decoded piecewise.
void decode_row(const KernelTable& k, const PackedView& w, int64_t row, FloatType dtype,
                void* out) {
  if (dtype == FloatType::kFloat32) return k.decode(w, row, 0, w.cols, static_cast<float*>(out));
  float piece[kPieceCols];
  for (int64_t col = 0; col < w.cols; col += kPieceCols) {
    const int64_t n = std::min(kPieceCols, w.cols - col);
    k.decode(w, row, col, n, piece);
    k.from_float(piece, n, dtype, advance(out, dtype, col));
  }
}

}  // namespace

void dequantize(const KernelTable& k, const PackedView& w, FloatType dtype, void* out,
                const Parallel& parallel) {
  parallel(w.rows, row_grain(w.cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      decode_row(k, w, r, dtype, advance(out, dtype, r * w.cols));
  });
}

void embedding(const KernelTable& k, const PackedView& w, const int64_t* indices, int64_t count,
               FloatType dtype, void* out, const Parallel& parallel) {
  parallel(count, row_grain(w.cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      decode_row(k, w, indices[i], dtype, advance(out, dtype, i * w.cols));
  });
}

}  // namespace bitfold
