// The only thing that an instruction set exports: pointers to its hot functions. Every body works
// on sixteen lanes, whatever the register width, and none lets the compiler fuse a multiplication
// with an addition unless it says so; so codes, scales and dequantized weights are the same bits on
// every instruction set. Only dot products (gemm_*) differ, in the last bits.
#pragma once

#include <cstdint>

#include "core/codebook.h"
#include "core/scale_coding.h"
#include "core/view.h"
#include "cpu/activations.h"

namespace bitfold {

struct SpanStats {
  float min, max, sum;
  bool finite;
};

// Sums for a least-squares scale: w is approximated by d * scale, d the unit decode (code - zero,
// or the level).
struct SpanFit {
  float wd, dd;  // sum w * d, sum d * d
  float d;       // sum d
};

struct Grid {  // code = clamp(round(w / scale + zero), 0, top)
  float scale, zero, top;
};

struct KernelTable {
  SpanStats (*stats)(const float* w, int64_t n);
  float (*error_grid)(const float* w, int64_t n, const Grid& grid);  // sum (w - decoded)^2
  float (*error_codebook)(const float* w, int64_t n, float scale, const Codebook& book);
  SpanFit (*fit_grid)(const float* w, int64_t n, const Grid& grid);
  SpanFit (*fit_codebook)(const float* w, int64_t n, float scale, const Codebook& book);
  void (*encode_grid)(const float* w, int64_t n, const Grid& grid, uint8_t* codes);
  void (*encode_codebook)(const float* w, int64_t n, float scale, const Codebook& book,
                          uint8_t* codes);

  // out[n] = w[row, col .. col + n); col a multiple of 16.
  void (*decode)(const PackedView& view, int64_t row, int64_t col, int64_t n, float* out);

  // Contiguous spans between float and half / bfloat16 bits (or a copy for float32).
  void (*to_float)(const void* source, FloatType dtype, int64_t n, float* out);
  void (*from_float)(const float* source, int64_t n, FloatType dtype, void* out);

  // y[m, n] += x[m, k] * w[n, k]^T; leading dimensions in elements, all rows contiguous.
  void (*gemm_nt)(const float* x, int64_t ldx, const float* w, int64_t ldw, float* y, int64_t ldy,
                  int64_t m, int64_t n, int64_t k);
  // y[m, k] += g[m, n] * w[n, k].
  void (*gemm_nn)(const float* g, int64_t ldg, const float* w, int64_t ldw, float* y, int64_t ldy,
                  int64_t m, int64_t n, int64_t k);

  // Integer products. Row m of `to` from `source` [cols]; false where integers cannot stand for it
  // (infinite, NaN or tiny values).
  bool (*quantize_activations)(const void* source, FloatType dtype, int64_t m, Activations* to);
  // y[r - begin] += x . w[r] for the rows [begin, end) of w; x is one row, laid out for Walk::kRows.
  void (*multiply_rows)(const PackedView& w, const Activations& x, int64_t begin, int64_t end,
                        float* scratch, float* y);
  // y[m, r] += x[m] . w[row + r], as far as such rows exist; y is [rows of x, kPanelRows], x laid out
  // for Walk::kPanels.
  void (*multiply_panel)(const PackedView& w, const Activations& x, int64_t row, void* scratch,
                         float* y);
};

inline constexpr int64_t kPanelRows = 16;  // lanes of a vector

// Bytes of scratch, which begins with a cache line.
inline int64_t rows_scratch_bytes(const Activations& x) { return (x.units + 16) * 4; }
inline int64_t panel_scratch_bytes(const Activations& x) {
  constexpr int64_t kExpanded = 4 * 16 * 8 * 64;  // blocks of lanes, parts of a vector
  return kExpanded + 4 * kPanelRows * x.units * 4;
}

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

}  // namespace bitfold
