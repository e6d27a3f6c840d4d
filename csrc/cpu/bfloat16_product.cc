#include "cpu/bfloat16_product.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/activations.h"
#include "cpu/outliers.h"
#include "cpu/scratch.h"

namespace bitfold {
namespace {

using Tile = Bfloat16Tile;

constexpr int64_t kPanelRows = 2 * Tile::kRows;
constexpr int64_t kPanelCols = 256;  // two planes of a panel fill two thirds of the first cache
// What a thread should have to do, in weights or activations, or starting it costs more than it
// saves.
constexpr int64_t kGrainElements = 1 << 15;

int64_t tiles_of(int64_t n, int64_t of_one) { return (n + of_one - 1) / of_one; }

// Rows of floats [16 or 32, kPanelCols] to tiles; what lies beyond `rows` and `cols` becomes zeros.
void split_rows(const KernelTable& k, float* floats, int64_t rows, int64_t cols, int64_t row_tiles,
                int64_t planes, bool turned, uint16_t* to, int64_t row_stride, int64_t plane) {
  const int64_t col_tiles = tiles_of(cols, Tile::kCols);
  for (int64_t i = 0; i < row_tiles * Tile::kRows; ++i) {
    const int64_t used = i < rows ? cols : 0;
    std::fill(floats + i * kPanelCols + used, floats + i * kPanelCols + col_tiles * Tile::kCols,
              0.0f);
  }
  for (int64_t i = 0; i < row_tiles; ++i)
    for (int64_t c = 0; c < col_tiles; ++c)
      k.bfloat16->split(floats + i * Tile::kRows * kPanelCols + c * Tile::kCols, kPanelCols, planes,
                        turned, to + i * row_stride + c * Tile::kSize, plane);
}

// Whether float sums of products with these neither overflow nor lose what is small.
bool fits(const KernelTable& k, const float* x, int64_t n) {
  float low, high;
  if (!k.stats(x, n, n, &low, &high)) return false;
  const float largest = std::max(high, -low);
  return largest == 0.0f || (largest >= kLeastActivation && largest <= kMostActivation);
}

}  // namespace

bool multiply_bfloat16(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                       const void* bias, FloatType dtype, bool one_plane, void* y,
                       const Parallel& parallel) {
  const int64_t w_planes = one_plane ? 1 : 2;
  const int64_t x_planes = one_plane || dtype == FloatType::kBFloat16 ? 1 : 2;
  const int64_t x_tiles = tiles_of(m, Tile::kRows), col_tiles = tiles_of(w.cols, Tile::kCols);
  const int64_t x_stride = col_tiles * Tile::kSize, x_plane = x_tiles * x_stride;
  const Scratch x_scratch(x_planes * x_plane * 2);
  uint16_t* const xs = reinterpret_cast<uint16_t*>(x_scratch.data());

  std::atomic<bool> all_fit{true};
  parallel(x_tiles, grain(Tile::kRows * w.cols, kGrainElements), [&](int64_t begin, int64_t end) {
    std::vector<float> floats(static_cast<size_t>(Tile::kRows * kPanelCols));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * Tile::kRows, rows = std::min(Tile::kRows, m - first);
      for (int64_t col = 0; col < w.cols; col += kPanelCols) {
        const int64_t n = std::min(kPanelCols, w.cols - col);
        for (int64_t i = 0; i < rows; ++i) {
          float* row = floats.data() + i * kPanelCols;
          k.to_float(advance(x, dtype, (first + i) * w.cols + col), dtype, n, row);
          if (!fits(k, row, n)) all_fit = false;
        }
        split_rows(k, floats.data(), rows, n, 1, x_planes, /*turned=*/true,
                   xs + tile * x_stride + col / Tile::kCols * Tile::kSize, 0, x_plane);
      }
    }
  });
  if (!all_fit) return false;

  std::vector<float> bias_f(static_cast<size_t>(bias ? w.rows : 0));
  if (bias) k.to_float(bias, dtype, w.rows, bias_f.data());
  parallel(tiles_of(w.rows, kPanelRows), grain(kPanelRows * w.cols, kGrainElements),
           [&](int64_t begin, int64_t end) {
             const Scratch w_scratch(w_planes * kPanelRows * kPanelCols * 2);
             uint16_t* const ws = reinterpret_cast<uint16_t*>(w_scratch.data());
             std::vector<float> decoded(static_cast<size_t>(kPanelRows * kPanelCols));
             std::vector<float> sums(static_cast<size_t>(x_tiles * Tile::kRows * kPanelRows));
             std::vector<float> rows(static_cast<size_t>(Tile::kRows * kPanelRows));
             Decoder decode(k, w);
             for (int64_t panel = begin; panel < end; ++panel) {
               const int64_t r0 = panel * kPanelRows, n = std::min(kPanelRows, w.rows - r0);
               for (size_t i = 0; i < sums.size(); ++i) {
                 const int64_t r = static_cast<int64_t>(i) / Tile::kRows % kPanelRows;
                 sums[i] = bias && r < n ? bias_f[static_cast<size_t>(r0 + r)] : 0.0f;
               }
               for (int64_t col = 0; col < w.cols; col += kPanelCols) {
                 const int64_t cols = std::min(kPanelCols, w.cols - col);
                 const int64_t tiles = tiles_of(cols, Tile::kCols), w_stride = tiles * Tile::kSize;
                 for (int64_t i = 0; i < n; ++i)
                   decode(r0 + i, col, cols, decoded.data() + i * kPanelCols);
                 split_rows(k, decoded.data(), n, cols, 2, w_planes, /*turned=*/false, ws, w_stride,
                            2 * w_stride);
                 k.bfloat16->multiply({.cols = tiles,
                                       .w = ws,
                                       .w_planes = w_planes,
                                       .x = xs + col / Tile::kCols * Tile::kSize,
                                       .x_planes = x_planes,
                                       .x_tiles = x_tiles,
                                       .x_cols = col_tiles,
                                       .sums = sums.data()});
               }
               for (int64_t i = 0; i < m; ++i) {
                 if (i % Tile::kRows == 0)
                   k.bfloat16->turn_sums(sums.data() + i * kPanelRows, rows.data());
                 k.from_float(rows.data() + i % Tile::kRows * kPanelRows, n, dtype,
                              advance(y, dtype, i * w.rows + r0));
               }
             }
           });
  return true;
}

}  // namespace bitfold
