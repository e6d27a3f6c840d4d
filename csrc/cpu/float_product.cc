#include "cpu/float_product.h"

#include <algorithm>
#include <vector>

#include "cpu/decoder.h"

namespace bitfold {
namespace {

// The piece of a weight that is float at any moment. With many activations it is reused from L2;
// with few, bytes of the packed weight are what is waited for, so rows are read in long streams
// that the prefetcher follows.
struct Tile {
  int64_t rows, cols;
};
constexpr Tile kWideTile = {64, 512};
constexpr Tile kStreamTile = {8, 4096};
constexpr int64_t kFewActivations = 16;

// A range handed to one thread should decode at least this many weights, or starting it costs more
// than it saves.
constexpr int64_t kGrainWeights = 1 << 16;

// A float32 view of contiguous rows; copies only if they are narrower.
class FloatRows {
 public:
  FloatRows(const KernelTable& k, const void* data, FloatType dtype, int64_t rows, int64_t cols,
            const Parallel& parallel) {
    if (dtype == FloatType::kFloat32) {
      data_ = static_cast<const float*>(data);
      return;
    }
    copy_.resize(static_cast<size_t>(rows * cols));
    parallel(rows, grain(cols, kGrainWeights), [&](int64_t begin, int64_t end) {
      k.to_float(static_cast<const uint16_t*>(data) + begin * cols, dtype, (end - begin) * cols,
                 copy_.data() + begin * cols);
    });
    data_ = copy_.data();
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

}  // namespace

void multiply_floats(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                     const void* bias, FloatType dtype, void* y, const Parallel& parallel) {
  const FloatRows bias_f(k, bias, dtype, bias ? 1 : 0, w.rows, run_serially);
  const FloatRows x_f(k, x, dtype, m, w.cols, parallel);
  Tile tile = m < kFewActivations ? kStreamTile : kWideTile;
  tile.cols = std::min(tile.cols, w.cols);
  const int64_t tiles = (w.rows + tile.rows - 1) / tile.rows;
  parallel(tiles, grain(tile.rows * w.cols, kGrainWeights), [&](int64_t begin, int64_t end) {
    std::vector<float> decoded(static_cast<size_t>(tile.rows * tile.cols));
    std::vector<float> sums(static_cast<size_t>(m * tile.rows));
    Decoder decode(k, w);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t r0 = t * tile.rows;
      const int64_t rows = std::min(tile.rows, w.rows - r0);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t r = 0; r < rows; ++r) {
          sums[static_cast<size_t>(i * tile.rows + r)] = bias ? bias_f.data()[r0 + r] : 0.0f;
        }
      }
      for (int64_t col = 0; col < w.cols; col += tile.cols) {
        const int64_t n = std::min(tile.cols, w.cols - col);
        for (int64_t r = 0; r < rows; ++r) decode(r0 + r, col, n, decoded.data() + r * tile.cols);
        k.gemm_nt(x_f.data() + col, w.cols, decoded.data(), tile.cols, sums.data(), tile.rows, m,
                  rows, n);
      }
      k.rows_from_float(sums.data(), tile.rows, m, rows, dtype, advance(y, dtype, r0), w.rows);
    }
  });
}

void multiply_floats_transposed(const KernelTable& k, const PackedView& w, const void* g, int64_t m,
                                FloatType dtype, void* gx, const Parallel& parallel) {
  // Threads own column strips, so that no two of them add to the same gradient; narrow strips where
  // the matrix is small.
  const int64_t strip = w.cols >= 4 * kWideTile.cols ? kWideTile.cols : 128;
  const FloatRows g_f(k, g, dtype, m, w.rows, parallel);
  parallel((w.cols + strip - 1) / strip, grain(strip * w.rows, kGrainWeights),
           [&](int64_t begin, int64_t end) {
             std::vector<float> decoded(static_cast<size_t>(kWideTile.rows * strip));
             std::vector<float> sums(static_cast<size_t>(m * strip));
             Decoder decode(k, w);
             for (int64_t s = begin; s < end; ++s) {
               const int64_t col = s * strip;
               const int64_t n = std::min(strip, w.cols - col);
               std::fill(sums.begin(), sums.end(), 0.0f);
               for (int64_t r0 = 0; r0 < w.rows; r0 += kWideTile.rows) {
                 const int64_t rows = std::min(kWideTile.rows, w.rows - r0);
                 for (int64_t r = 0; r < rows; ++r)
                   decode(r0 + r, col, n, decoded.data() + r * strip);
                 k.gemm_nn(g_f.data() + r0, w.rows, decoded.data(), strip, sums.data(), strip, m,
                           rows, n);
               }
               k.rows_from_float(sums.data(), strip, m, n, dtype, advance(gx, dtype, col), w.cols);
             }
           });
}

}  // namespace bitfold
