#include "cpu/bfloat16_product.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/activations.h"
#include "cpu/decoder.h"
#include "cpu/scratch.h"

namespace bitfold {
namespace {

using Tile = Bfloat16Tile;

constexpr int64_t kPanelRows = 2 * Tile::kRows;
constexpr int64_t kChunkCols = 256;  // two planes of a panel's are 32 KiB: within the first cache
// Panels that meet a chunk of the activations one after another, while it is in the second cache.
constexpr int64_t kPanelsTogether = 8;
// What a thread should have to do, in weights or activations, or starting it costs more than it
// saves.
constexpr int64_t kGrainElements = 1 << 15;

int64_t tiles_of(int64_t n, int64_t of_one) { return (n + of_one - 1) / of_one; }

// Where tiles go: rows of them, and planes, so many elements apart.
struct TilesOf {
  uint16_t* first;
  int64_t row_tiles, row_stride;
  int64_t planes, plane;
  bool turned;
};

// Floats [row_tiles * 16, kChunkCols] to tiles; what lies beyond `rows` and `cols` becomes zeros.
void split_chunk(const KernelTable& k, float* floats, int64_t rows, int64_t cols,
                 const TilesOf& to) {
  const int64_t col_tiles = tiles_of(cols, Tile::kCols);
  for (int64_t i = 0; i < to.row_tiles * Tile::kRows; ++i) {
    float* row = floats + i * kChunkCols;
    std::fill(row + (i < rows ? cols : 0), row + col_tiles * Tile::kCols, 0.0f);
  }
  for (int64_t i = 0; i < to.row_tiles; ++i)
    for (int64_t c = 0; c < col_tiles; ++c)
      k.bfloat16->split(floats + i * Tile::kRows * kChunkCols + c * Tile::kCols, kChunkCols,
                        to.planes, to.turned, to.first + i * to.row_stride + c * Tile::kSize,
                        to.plane);
}

// Whether float sums of products with these, and weights as they are, neither overflow nor lose
// what is small. (Tiles take numbers below 1.2e-38 for zero, products too.)
bool tiles_suit(const KernelTable& k, const float* x, int64_t n) {
  float low, high;
  if (!k.stats(x, n, n, &low, &high)) return false;
  const float largest = std::max(high, -low);
  return largest == 0.0f || (largest >= kLeastActivation && largest <= kMostActivation);
}

// Activations as tiles: [planes][row_tiles][col_tiles].
class SplitActivations {
 public:
  SplitActivations(int64_t rows, int64_t cols, int64_t planes)
      : rows(rows),
        cols(cols),
        planes(planes),
        row_tiles(tiles_of(rows, Tile::kRows)),
        col_tiles(tiles_of(cols, Tile::kCols)),
        scratch_(2 * planes * plane()) {}

  // False if tiles cannot stand for some of x.
  bool split(const KernelTable& k, const void* x, FloatType dtype, const Parallel& parallel) {
    std::atomic<bool> all_fit{true};
    parallel(row_tiles, grain(Tile::kRows * cols, kGrainElements), [&](int64_t begin, int64_t end) {
      std::vector<float> floats(static_cast<size_t>(Tile::kRows * kChunkCols));
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * Tile::kRows, n = std::min(Tile::kRows, rows - first);
        for (int64_t col = 0; col < cols; col += kChunkCols) {
          const int64_t width = std::min(kChunkCols, cols - col);
          for (int64_t i = 0; i < n; ++i) {
            float* row = floats.data() + i * kChunkCols;
            k.to_float(advance(x, dtype, (first + i) * cols + col), dtype, width, row);
            if (!tiles_suit(k, row, width)) all_fit = false;
          }
          uint16_t* const to = data() + (tile * col_tiles + col / Tile::kCols) * Tile::kSize;
          split_chunk(k, floats.data(), n, width,
                      {.first = to,
                       .row_tiles = 1,
                       .row_stride = 0,
                       .planes = planes,
                       .plane = plane(),
                       .turned = true});
        }
      }
    });
    return all_fit;
  }

  int64_t plane() const { return row_tiles * col_tiles * Tile::kSize; }
  uint16_t* data() const { return reinterpret_cast<uint16_t*>(scratch_.data()); }

  const int64_t rows, cols, planes, row_tiles, col_tiles;

 private:
  Scratch scratch_;
};

// Some panels of the weight on their way through the columns, in one thread.
class PanelsProduct {
 public:
  PanelsProduct(const KernelTable& k, const PackedView& w, const SplitActivations& x,
                int64_t w_planes, int64_t most_panels)
      : k_(k),
        w_(w),
        x_(x),
        w_planes_(w_planes),
        scratch_(4 * most_panels * panel_sums() + 2 * w_planes * kPanelRows * kChunkCols),
        sums_(reinterpret_cast<float*>(scratch_.data())),
        tiles_(reinterpret_cast<uint16_t*>(sums_ + most_panels * panel_sums())),
        decoded_(static_cast<size_t>(kPanelRows * kChunkCols)),
        rows_(static_cast<size_t>(Tile::kRows * kPanelRows)),
        decode_(k, w) {}

  // `bias`: of all rows of the weight, or null.
  void begin(int64_t panels, int64_t row, const float* bias) {
    for (int64_t i = 0; i < panels * panel_sums(); ++i) {
      const int64_t r = row + i / panel_sums() * kPanelRows + i / Tile::kRows % kPanelRows;
      sums(0)[i] = bias && r < w_.rows ? bias[r] : 0.0f;
    }
  }
  void add(int64_t panel, int64_t row, int64_t col) {
    const int64_t n = std::min(kPanelRows, w_.rows - row),
                  cols = std::min(kChunkCols, w_.cols - col);
    for (int64_t i = 0; i < n; ++i) decode_(row + i, col, cols, decoded_.data() + i * kChunkCols);
    const int64_t col_tiles = tiles_of(cols, Tile::kCols), stride = col_tiles * Tile::kSize;
    split_chunk(k_, decoded_.data(), n, cols,
                {.first = tiles_,
                 .row_tiles = 2,
                 .row_stride = stride,
                 .planes = w_planes_,
                 .plane = 2 * stride,
                 .turned = false});
    k_.bfloat16->multiply({.cols = col_tiles,
                           .w = tiles_,
                           .w_planes = w_planes_,
                           .x = x_.data() + col / Tile::kCols * Tile::kSize,
                           .x_planes = x_.planes,
                           .x_tiles = x_.row_tiles,
                           .x_cols = x_.col_tiles,
                           .sums = sums(panel)});
  }
  void finish(int64_t panel, int64_t row, FloatType dtype, void* y) {
    for (int64_t i = 0; i < x_.rows; i += Tile::kRows) {
      k_.bfloat16->turn_sums(sums(panel) + i / Tile::kRows * 2 * Tile::kSums, rows_.data());
      k_.rows_from_float(rows_.data(), kPanelRows, std::min(Tile::kRows, x_.rows - i),
                         std::min(kPanelRows, w_.rows - row), dtype,
                         advance(y, dtype, i * w_.rows + row), w_.rows);
    }
  }

 private:
  int64_t panel_sums() const { return x_.row_tiles * 2 * Tile::kSums; }
  float* sums(int64_t panel) { return sums_ + panel * panel_sums(); }

  const KernelTable& k_;
  const PackedView& w_;
  const SplitActivations& x_;
  const int64_t w_planes_;
  const Scratch scratch_;
  float* const sums_;      // [panels][row tiles of x][2][sums of a tile]
  uint16_t* const tiles_;  // of one panel and chunk
  std::vector<float> decoded_, rows_;
  Decoder decode_;
};

}  // namespace

bool multiply_bfloat16(const KernelTable& k, const PackedView& w, const void* x, int64_t m,
                       const void* bias, FloatType dtype, bool one_plane, void* y,
                       const Parallel& parallel) {
  SplitActivations xs(m, w.cols, one_plane || dtype == FloatType::kBFloat16 ? 1 : 2);
  if (!xs.split(k, x, dtype, parallel)) return false;
  std::vector<float> floats(static_cast<size_t>(bias ? w.rows : 0));
  if (bias) k.to_float(bias, dtype, w.rows, floats.data());
  const float* const bias_f = bias ? floats.data() : nullptr;

  parallel(tiles_of(w.rows, kPanelRows), grain(kPanelRows * w.cols, kGrainElements),
           [&](int64_t begin, int64_t end) {
             const int64_t most = std::min(kPanelsTogether, end - begin);
             PanelsProduct product(k, w, xs, one_plane ? 1 : 2, most);
             for (int64_t first = begin; first < end; first += most) {
               const int64_t panels = std::min(most, end - first);
               const auto row = [first](int64_t panel) { return (first + panel) * kPanelRows; };
               product.begin(panels, row(0), bias_f);
               for (int64_t col = 0; col < w.cols; col += kChunkCols)
                 for (int64_t p = 0; p < panels; ++p) product.add(p, row(p), col);
               for (int64_t p = 0; p < panels; ++p) product.finish(p, row(p), dtype, y);
             }
           });
  return true;
}

}  // namespace bitfold
