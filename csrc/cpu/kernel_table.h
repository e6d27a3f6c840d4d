// The only thing that an instruction set exports: pointers to its hot functions. Every body works
// on sixteen lanes, whatever the register width, and none lets the compiler fuse a multiplication
// with an addition unless it says so; so codes, scales and dequantized weights are the same bits on
// every instruction set. Only products (gemm_*, multiply_*) differ, in the last bits of their float
// sums; those of tiles (bfloat16) by what their operands lose.
#pragma once

#include <cstdint>

#include "core/codebook.h"
#include "core/format.h"
#include "core/scale_coding.h"
#include "core/shrinks.h"
#include "core/view.h"
#include "cpu/activations.h"

namespace bitfold {

// How a format turns a weight into a code, once a scale (and zero point) is chosen:
//   integer grid  code = clamp(round(w / scale + zero), 0, 2^bits - 1), unit decode = code - zero
//   codebook      code = the nearest level of w / scale,                unit decode = level
struct Encoding {
  int bits;
  Zero zero;             // integer grids: what kind of zero point
  const Codebook* book;  // null for integer grids
};

// Spans of weights are tried sixteen at a time, each in a lane of its own.
inline constexpr int kSpanLanes = 16;

// Sums over each span: the squared error, and what least squares need; w is approximated by
// d * scale, d the unit decode. w and d are summed for real zero points only.
struct SpanFits {
  float error[kSpanLanes], wd[kSpanLanes], dd[kSpanLanes];  // sum (w - d * scale)^2, w * d, d * d
  float w[kSpanLanes], d[kSpanLanes];                       // sum w, d
};

// Rounding with error feedback. Column k is rounded from v = w + c, where c is what the errors
// (w - decoded) of other columns add up to; the error that it leaves, or its change, moves the c of
// the columns after it. With a Cholesky factor for `matrix` that is GPTQ, with the Hessian itself
// and errors of an earlier pass it is cyclic coordinate descent.
inline constexpr int64_t kFeedbackColumns = 128;  // c of sixteen rows: 8 KiB, in the first cache

struct FeedbackColumns {  // in the order of rounding; the same for all panels
  int64_t count;          // at most kFeedbackColumns
  const float* matrix;  // [count, count]: row k, column j > k: what the error of k adds to c of j;
                        // null if nothing
  const float* factor;  // [count] makes `correction` c
  const float* cost;    // [count] of (v - decoded)^2
  const int32_t* column;  // [count] where the column is in the panel
  const int32_t* group;   // [count] whose scale it has
};

struct FeedbackPanel {   // sixteen rows, one to a lane
  const float* weights;  // [columns of the matrix, 16]
  const float* scale;    // [groups, 16]
  const float* zero;     // [groups, 16]
  // [columns of the matrix, 16] or null: not 0 where w is stored elsewhere, without an error.
  const uint8_t* exact;
  // [3, 16, 16] or null: learned codebooks, by rank and lane: the pivot above, the level, its code.
  const float* books;
  int64_t stride;  // between the rows of the three below; may be negative
  // [count, 16] sums over other columns (and the column itself where `change` is given) of which
  // `factor` makes c; null: nothing.
  const float* correction;
  float* error;  // [count, 16] w - decoded
  // [count, 16] or null. Not null: `error` and `codes` hold an earlier choice, which yields only to
  // a better one; receives by how much `error` has changed.
  float* change;
  uint8_t* codes;  // [columns of the matrix, 16]
  float* cost;     // [16] grows by (the change of) the sum of cost * (v - decoded)^2
};

// Sums over each span of the residuals r = w / scale + zero - code, in steps of the grid.
struct ShrinkSums {
  float error[kSpanLanes];  // sum |r|
  float pull[kSpanLanes];   // sum of r less its proximal point: r min(1, |r|^(p - 2) / beta)
};

// Products on a unit that multiplies tiles of bfloat16 numbers: sixteen rows of the weight, sixteen
// of activations, 32 columns of both. A float is split into planes: the nearest bfloat16 number,
// and the nearest to what that leaves.
struct Bfloat16Tile {
  static constexpr int64_t kRows = 16, kCols = 32, kSize = kRows * kCols, kSums = kRows * kRows;
};
struct Bfloat16Product {
  int64_t cols;       // tiles of them, here
  const uint16_t* w;  // [w_planes][2][cols] tiles, each [16 rows][32 columns]
  int64_t w_planes;
  // [x_planes][x_tiles][x_cols] tiles from the same columns on, each [16 pairs of columns][16 rows]
  const uint16_t* x;
  int64_t x_planes, x_tiles, x_cols;
  float* sums;  // [x_tiles][2][16 rows of w][16 rows of x] grow by the product
};
struct Bfloat16Kernels {
  // A tile from float rows, `ld` apart; `turned`: pairs of columns first. `plane`: elements from
  // one plane to the next.
  void (*split)(const float* rows, int64_t ld, int64_t planes, bool turned, uint16_t* tile,
                int64_t plane);
  // At most two planes each; second times second, too small to count, is left out.
  void (*multiply)(const Bfloat16Product& product);
  // [2][16][16] of the sums to [16 rows of x][32 rows of w].
  void (*turn_sums)(const float* sums, float* rows);
};

// A row is cut in spans of `group` weights (a multiple of 16, or the whole row), each with its own
// scale.
struct KernelTable {
  // low[g], high[g] = extremes of span g. False if any weight is NaN or infinite.
  bool (*stats)(const float* w, int64_t n, int64_t group, float* low, float* high);

  // scale[i], zero[i] for the range [low[i], high[i]], its ends drawn in by the factors
  // shrink_low[i] and shrink_high[i].
  void (*choices)(const Encoding& encoding, int64_t n, const float* low, const float* high,
                  const float* shrink_low, const float* shrink_high, float* scale, float* zero);

  // block[16 * j + lane] = spans[lane][j], j < n.
  void (*interleave)(const float* const* spans, int64_t n, float* block);
  // errors[16 * c + lane] = squared error of the lane's span for the choice (scale, zero) in the
  // same place, c < count; infinite where that is none (scale not positive and finite, zero point
  // beyond 2048).
  void (*errors)(const Encoding& encoding, const float* block, int64_t n, int64_t count,
                 const float* scale, const float* zero, float* errors);
  // The choice of least error, the first of several, and that error. low and high: extremes of each
  // span. Scratch of 32 * (n / 2) words.
  void (*best_choice)(const Encoding& encoding, const float* block, int64_t n, const float* low,
                      const float* high, int64_t count, const float* scale, const float* zero,
                      int16_t* scratch, float* best_scale, float* best_zero, float* least);
  // One choice for each lane.
  void (*fit)(const Encoding& encoding, const float* block, int64_t n, const float* scale,
              const float* zero, SpanFits* fits);

  // The same with every square and product multiplied by importance[16 * j + lane].
  void (*weighted_errors)(const Encoding& encoding, const float* block, const float* importance,
                          int64_t n, int64_t count, const float* scale, const float* zero,
                          float* errors);
  void (*weighted_fit)(const Encoding& encoding, const float* block, const float* importance,
                       int64_t n, const float* scale, const float* zero, SpanFits* fits);

  // Chooses the codes of `columns` of a panel, one column after the other.
  void (*feed_back)(const Encoding& encoding, const FeedbackColumns& columns,
                    const FeedbackPanel& panel);

  // Residuals of a grid of 2^bits codes under the norm |r|^p, p from 0 to 2, its power to 3e-5
  // relative (HQQ; solvers/hqq.h).
  void (*shrink)(int bits, const float* block, int64_t n, const float* scale, const float* zero,
                 float p, float beta, ShrinkSums* sums);

  // One packed row from scale[g] and zero[g] (null for codebooks).
  void (*encode)(const Encoding& encoding, const float* w, int64_t n, int64_t group,
                 const float* scale, const float* zero, uint8_t* row);

  // out[n] = w[row, col .. col + n); col a multiple of 16.
  void (*decode)(const PackedView& view, int64_t row, int64_t col, int64_t n, float* out);

  // The whole row in `dtype`; `stream` writes around the caches (others see it after a fence).
  void (*decode_row)(const PackedView& view, int64_t row, FloatType dtype, void* out, bool stream);

  // Contiguous spans between float and half / bfloat16 bits (or a copy for float32).
  void (*to_float)(const void* source, FloatType dtype, int64_t n, float* out);
  void (*from_float)(const float* source, int64_t n, FloatType dtype, void* out);
  // The same for rows, `ld` and `ld_out` elements apart.
  void (*rows_from_float)(const float* source, int64_t ld, int64_t rows, int64_t n, FloatType dtype,
                          void* out, int64_t ld_out);

  // y[m, n] += x[m, k] * w[n, k]^T; leading dimensions in elements, all rows contiguous.
  void (*gemm_nt)(const float* x, int64_t ldx, const float* w, int64_t ldw, float* y, int64_t ldy,
                  int64_t m, int64_t n, int64_t k);
  // y[m, k] += g[m, n] * w[n, k].
  void (*gemm_nn)(const float* g, int64_t ldg, const float* w, int64_t ldw, float* y, int64_t ldy,
                  int64_t m, int64_t n, int64_t k);

  // Integer products. Row m of `to` from `source` [cols]; false where integers cannot stand for it
  // (infinite, NaN or tiny values).
  bool (*quantize_activations)(const void* source, FloatType dtype, int64_t m, Activations* to);
  // Where spans are several units: x.shared; x.sum serves as scratch. Comes before the integers.
  void (*mark_shared_spans)(const PackedView& w, const Activations& x);
  // Rows of activations up to which multiply_rows is the faster way: at most kMostWalkedRows.
  int64_t walked_rows;
  // y[i * ldy + r - begin] += x[i] . w[r] for the rows [begin, end) of w; x is laid out for
  // Walk::kRows, of at most walked_rows rows, and of one where its operand is kTwoBytes.
  void (*multiply_rows)(const PackedView& w, const Activations& x, int64_t begin, int64_t end,
                        void* scratch, float* y, int64_t ldy);
  // Bytes of scratch, which begins with a cache line.
  int64_t (*rows_scratch_bytes)(const PackedView& w, const Activations& x);
  // y[m, r] += x[m] . w[row + r], as far as such rows exist; y is [rows of x, panel_rows], x laid
  // out for Walk::kPanels.
  int64_t panel_rows;
  void (*multiply_panel)(const PackedView& w, const Activations& x, int64_t row, void* scratch,
                         float* y);
  int64_t (*panel_scratch_bytes)(const PackedView& w, const Activations& x);

  // y[i * ldy] += sum over the outliers [begin, end) of value * x[column * ldx + i], i < m; x is
  // transposed, [cols, ldx], readable to its end: ldx is 1, 16, or a multiple of kOutlierLanes.
  void (*add_outliers)(const OutlierView& w, int64_t begin, int64_t end, int64_t cols,
                       const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy);

  // y[i, j] = sum over cols of codes[j] * q[i] for j < n rows of bytes and i < m; leading
  // dimensions in elements. cols at most 65536, or a sum might leave 32 bits; rows of q go on,
  // readable, to a whole number of 64.
  void (*dot_codes)(const uint8_t* codes, int64_t ldw, int64_t n, const int8_t* q, int64_t ldq,
                    int64_t m, int64_t cols, int32_t* y, int64_t ldy);

  const Bfloat16Kernels* bfloat16;  // null where no unit multiplies tiles
};

inline constexpr int64_t kMostWalkedRows = 4;
inline constexpr int64_t kOutlierLanes = 64;

namespace portable {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512vnni {
extern const KernelTable table;
}
namespace amx {  // all else is avx512vnni's
extern const Bfloat16Kernels bfloat16;
}

}  // namespace bitfold
