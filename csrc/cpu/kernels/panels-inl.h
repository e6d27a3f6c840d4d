// Products of many activations with panels of a weight: kPanelRows rows at once, so that a vector of
// lanes holds one column (or two, or four) of sixteen rows and activations are broadcast. Included by
// each target.

constexpr int64_t kPanelRows = 16 * kPanelVectors;
// Columns expanded at a time: their operands, at most 2 bytes each, stay in the first cache.
constexpr int64_t kPanelCols = 256;

struct WordDot {
  static constexpr int kSlabBytes = 128;  // of 64 columns
  static inline I add(I sum, I w, I x) { return dot_words(sum, w, x); }
};
template <bool kSmall>
struct ByteDot {
  static constexpr int kSlabBytes = 64;
  static inline I add(I sum, I w, I x) { return dot_bytes<kSmall>(sum, w, x); }
};

// Where a tile of the product finds things. A slab is 64 columns.
struct PanelTile {
  const uint8_t* weights;  // operands [slabs][steps][kPanelRows lanes]
  const float* factor;     // [units][kPanelRows]
  const float* shift;      // likewise, or null
  const uint8_t* x;        // [slabs][rows][slab bytes], first row of the tile
  int64_t x_stride;        // bytes from slab to slab
  const float* scale;      // [rows][x_units], first row and unit
  const float* sum;
  int64_t x_units;
  int64_t units;           // of this piece
  int64_t units_per_slab;
  float* y;
  int64_t ldy;
};

template <class Dot, int M>
static void multiply_tile(const PanelTile& t) {
  const int64_t steps = Dot::kSlabBytes / 4 / t.units_per_slab;
  const uint8_t* weights = t.weights;
  for (int64_t u = 0; u < t.units; ++u) {
    const int64_t slab = u / t.units_per_slab;
    const uint8_t* x = t.x + slab * t.x_stride + (u - slab * t.units_per_slab) * steps * 4;
    I sums[M][kPanelVectors];
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < kPanelVectors; ++v) sums[i][v] = zero_i();
    for (int64_t s = 0; s < steps; ++s) {
      I w[kPanelVectors];
      for (int v = 0; v < kPanelVectors; ++v) w[v] = load_i(weights + 64 * v);
      weights += 64 * kPanelVectors;
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const I one = broadcast_i(x + i * Dot::kSlabBytes);
        for (int v = 0; v < kPanelVectors; ++v) sums[i][v] = Dot::add(sums[i][v], w[v], one);
      }
      x += 4;
    }
    for (int v = 0; v < kPanelVectors; ++v) {
      const F factor = load(t.factor + u * kPanelRows + 16 * v);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        float* y = t.y + i * t.ldy + 16 * v;
        const F scale = mul(factor, set1(t.scale[i * t.x_units + u]));
        store(y, fma(to_float(sums[i][v]), scale, load(y)));
      }
    }
    if (!t.shift) continue;
    for (int v = 0; v < kPanelVectors; ++v) {
      const F shift = load(t.shift + u * kPanelRows + 16 * v);
      for (int i = 0; i < M; ++i) {
        float* y = t.y + i * t.ldy + 16 * v;
        store(y, sub(load(y), mul(shift, set1(t.sum[i * t.x_units + u]))));
      }
    }
  }
}

template <class Dot>
static void multiply_tile(const PanelTile& t, int64_t rows) {
  switch (rows) {
    case 1:
      return multiply_tile<Dot, 1>(t);
    case 2:
      return multiply_tile<Dot, 2>(t);
    case 3:
      return multiply_tile<Dot, 3>(t);
    case 4:
      return multiply_tile<Dot, 4>(t);
    default:
      break;
  }
  if constexpr (kTileRows > 4) {
    switch (rows) {
      case 5:
        return multiply_tile<Dot, 5>(t);
      case 6:
        return multiply_tile<Dot, 6>(t);
      case 7:
        return multiply_tile<Dot, 7>(t);
      case 8:
        return multiply_tile<Dot, 8>(t);
      case 9:
        return multiply_tile<Dot, 9>(t);
      case 10:
        return multiply_tile<Dot, 10>(t);
      case 11:
        return multiply_tile<Dot, 11>(t);
      case 12:
        return multiply_tile<Dot, 12>(t);
      default:
        return;
    }
  }
}

// Sixteen rows' units as [unit][kPanelRows], at lanes 16 * v.
static inline void transpose_units(const float* rows, int64_t stride, int64_t units, float* to) {
  for (int64_t u = 0; u < units; u += 16) {
    I block[16];
    for (int i = 0; i < 16; ++i) block[i] = load_i(rows + i * stride + u);
    transpose(block);
    for (int i = 0; i < 16; ++i) store_i(to + (u + i) * kPanelRows, block[i]);
  }
}

// Factors and shifts of a panel. `scratch`: 2 * 16 * (units + 16) floats.
template <class Codec>
static inline bool load_panel_units(const PackedView& w, const Activations& x, int64_t row,
                                    const OperandRange* ranges, float* scratch, float* factor,
                                    float* shift) {
  const int64_t stride = x.units + 16;
  bool shifted = false;
  for (int v = 0; v < kPanelVectors; ++v) {
    for (int i = 0; i < 16; ++i) {
      const int64_t lane = 16 * v + i;
      const int64_t r = row + lane < w.rows ? row + lane : w.rows - 1;
      shifted = load_units<Codec::kBits>(w, r, x.unit, x.units, ranges[lane], scratch + i * stride,
                                         scratch + (16 + i) * stride);
    }
    transpose_units(scratch, stride, x.units, factor + 16 * v);
    if (shifted) transpose_units(scratch + 16 * stride, stride, x.units, shift + 16 * v);
  }
  return shifted;
}

// Operands of kPanelCols columns of a panel from column `col` on.
template <class Codec>
static inline void expand_panel(const PackedView& w, const Codec* codecs, bool own_table,
                                int64_t row, int64_t col, uint8_t* to) {
  constexpr int64_t kBlockCols = 16 * kColsPerLane<Codec::kBits>;
  constexpr int kParts = Codec::kParts;
  const int64_t whole = whole_blocks<Codec>(w);
  const int64_t last = (w.cols + kBlockCols - 1) / kBlockCols;
  const int64_t first = col / kBlockCols;
  for (int64_t b = first; b < first + kPanelCols / kBlockCols && b < last; ++b) {
    for (int v = 0; v < kPanelVectors; ++v) {
      Stored codes[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t lane = row + 16 * v + i;
        const uint8_t* bytes = w.codes + (lane < w.rows ? lane : w.rows - 1) * w.row_bytes;
        prefetch(bytes + kPanelRows * w.row_bytes + 64 * b);  // the next panel's; need not exist
        codes[i] =
            b < whole ? load_stored<Codec>(w, bytes, b) : load_stored_tail<Codec>(w, bytes, b);
      }
      uint8_t* out = to + ((b - first) * 16 * kParts * kPanelVectors + v) * 64;
      const auto place = [&](int lane, int part) {
        return out + (lane * kParts + part) * kPanelVectors * 64;
      };
      if (own_table) {  // each row looks up for itself, before lanes become rows
        I parts[16][kParts];
        for (int i = 0; i < 16; ++i) codecs[16 * v + i].expand(codes[i], parts[i]);
        for (int p = 0; p < kParts; ++p) {
          I column[16];
          for (int i = 0; i < 16; ++i) column[i] = parts[i][p];
          transpose(column);
          for (int i = 0; i < 16; ++i) store_i(place(i, p), column[i]);
        }
        continue;
      }
      I low[16], high[16];
      for (int i = 0; i < 16; ++i) low[i] = codes[i].low;
      transpose(low);
      if constexpr (Codec::kBits == 3) {
        for (int i = 0; i < 16; ++i) high[i] = codes[i].high;
        transpose(high);
      }
      for (int i = 0; i < 16; ++i) {
        I parts[kParts];
        codecs[0].expand({low[i], Codec::kBits == 3 ? high[i] : low[i]}, parts);
        for (int p = 0; p < kParts; ++p) store_i(place(i, p), parts[p]);
      }
    }
  }
}

// y[i, r] += for every row of x and the rows [row, row + kPanelRows) of w that exist; y has
// kPanelRows columns.
template <class Codec, class Dot>
static void multiply_panel_with(const PackedView& w, const Activations& x, int64_t row,
                                void* scratch, float* y) {
  uint8_t* operands = static_cast<uint8_t*>(scratch);
  float* factor = reinterpret_cast<float*>(operands + kPanelCols * 2 * kPanelRows);
  float* shift = factor + x.units * kPanelRows;
  float* rows = shift + x.units * kPanelRows;

  const bool own_table = w.family == Family::kLearnedCodebook && w.scale_row_stride != 0;
  Codec codecs[kPanelRows];
  OperandRange ranges[kPanelRows];
  for (int64_t i = 0; i < kPanelRows; ++i) {
    const int64_t r = row + i < w.rows ? row + i : w.rows - 1;
    if (i == 0 || own_table) {
      ranges[i] = codecs[i].prepare(w, r);
    } else {
      ranges[i] = ranges[0];
    }
  }
  const bool shifted = load_panel_units<Codec>(w, x, row, ranges, rows, factor, shift);
  const int64_t tiles = (x.rows + kTileRows - 1) / kTileRows;
  const int64_t slab_bytes = x.layout->block_bytes;
  for (int64_t col = 0; col < w.cols; col += kPanelCols) {
    expand_panel<Codec>(w, codecs, own_table, row, col, operands);
    const int64_t cols = w.cols - col < kPanelCols ? w.cols - col : kPanelCols;
    const int64_t first_unit = col / x.unit;
    PanelTile t{};
    t.weights = operands;
    t.factor = factor + first_unit * kPanelRows;
    t.shift = shifted ? shift + first_unit * kPanelRows : nullptr;
    t.x_stride = x.rows * slab_bytes;
    t.x_units = x.units;
    t.units = (cols + x.unit - 1) / x.unit;
    t.units_per_slab = 64 / x.unit;
    t.ldy = kPanelRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = x.rows * tile / tiles;
      t.x = x.data + (col / 64 * x.rows + m) * slab_bytes;
      t.scale = x.scale + m * x.units + first_unit;
      t.sum = x.sum + m * x.units + first_unit;
      t.y = y + m * t.ldy;
      multiply_tile<Dot>(t, x.rows * (tile + 1) / tiles - m);
    }
  }
}
