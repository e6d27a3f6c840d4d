// Products of many activations with panels of a weight: sixteen rows at once, so that the lanes of a
// vector are rows and activations are broadcast. Codes are expanded in the shadow of the products, so
// even a second and third look at them is free. Included by each target.

static_assert(kPanelRows == 16);
// Blocks of sixteen lanes of each row that are transposed at a time: what a tile of activations
// multiplies with stays in the first cache.
constexpr int kPanelBlocks = 4;

// The codes of a panel, lane by lane of its rows: transposed, and expanded as they are used.
template <class Codec>
struct PackedPanel {
  static constexpr int kBits = Codec::kBits;
  static constexpr int kParts = Codec::kParts;
  static constexpr bool kWords = Codec::kWords;
  static constexpr bool kSmall = Codec::kSmall;
  static constexpr int kLaneBytes = Codec::kBits == 3 ? 128 : 64;
  Codec codec;

  // `row(i)`: the stored codes of row i.
  template <class Row>
  static inline void place(const Row& row, const Codec*, uint8_t* to) {
    I lanes[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) lanes[i] = row(i).low;
    transpose(lanes);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store_i(to + kLaneBytes * i, lanes[i]);
    if constexpr (kBits == 3) {
      for (int i = 0; i < 16; ++i) lanes[i] = row(i).high;
      transpose(lanes);
      for (int i = 0; i < 16; ++i) store_i(to + kLaneBytes * i + 64, lanes[i]);
    }
  }
  Stored load(const uint8_t* lane) const {
    const I low = load_i(lane);
    return {low, kBits == 3 ? load_i(lane + 64) : low};
  }
  I part(const uint8_t*, const Stored& codes, int p) const { return codec.part(codes, p); }
};

// The same, expanded beforehand: where each row has its own levels, and where expanding is not for
// free.
template <class Codec>
struct ExpandedPanel {
  static constexpr int kBits = Codec::kBits;
  static constexpr int kParts = Codec::kParts;
  static constexpr bool kWords = Codec::kWords;
  static constexpr bool kSmall = Codec::kSmall;
  static constexpr int kLaneBytes = 64 * Codec::kParts;
  Codec codec;

  template <class Row>
  static inline void place(const Row& row, const Codec* codecs, uint8_t* to) {
    Stored codes[16];
    for (int i = 0; i < 16; ++i) codes[i] = row(i);
    for (int p = 0; p < kParts; ++p) {
      I lanes[16];
      for (int i = 0; i < 16; ++i) lanes[i] = codecs[i].part(codes[i], p);
      transpose(lanes);
      for (int i = 0; i < 16; ++i) store_i(to + kLaneBytes * i + 64 * p, lanes[i]);
    }
  }
  Stored load(const uint8_t*) const { return Stored(); }
  I part(const uint8_t* lane, const Stored&, int p) const { return load_i(lane + 64 * p); }
};

// A piece of the product: M rows of activations, sixteen of the weight, `units` units of columns.
struct Tile {
  const uint8_t* weights;  // [lanes of a row][lane bytes]
  const float* factor;     // [units][16]
  const float* shift;      // likewise, or null
  const uint8_t* x;        // [slabs of 64 columns][rows][slab bytes]
  int64_t x_stride;        // bytes from slab to slab
  const float* scale;      // [rows][x_units]
  const float* sum;
  int64_t x_units;
  int64_t units, unit;
  float* y;  // [rows][16]
};

// Every loop over the tile is unrolled, or its sums would live in memory.
template <class Panel, int M>
static void multiply_tile(const Panel& panel, const Tile& from) {
  constexpr int kSlabBytes = Panel::kWords ? 128 : 64;
  constexpr int kCols = kColsPerLane<Panel::kBits>;
  // A product takes four cycles: few sums would wait for themselves.
  constexpr int kChains = M <= kTileRows / 2 && Panel::kParts > 1 ? 2 : 1;
  const Tile t = from;  // what is stored to y cannot change a copy
  F y[M];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) y[i] = load(t.y + 16 * i);
  const uint8_t* lane = t.weights;
  const uint8_t* slab = t.x;
  int64_t col = 0;  // of the slab
  for (int64_t u = 0; u < t.units; ++u) {
    I sums[kChains][M];
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) sums[c][i] = zero_i();
    }
    const uint8_t* x = slab + col * (kSlabBytes / 64);
    for (int64_t j = 0; j < t.unit; j += kCols) {
      const Stored codes = panel.load(lane);
#pragma GCC unroll 8
      for (int p = 0; p < Panel::kParts; ++p) {
        const I w = panel.part(lane, codes, p);
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) {
          const uint8_t* one = x + i * kSlabBytes + 4 * p;
          I& sum = sums[p % kChains][i];
          if constexpr (Panel::kWords) {
            sum = dot_words_with(sum, w, one);
          } else {
            sum = dot_bytes_with<Panel::kSmall>(sum, w, one);
          }
        }
      }
      lane += Panel::kLaneBytes;
      x += 4 * Panel::kParts;
    }
    const F factor = load(t.factor + 16 * u);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const I sum = kChains == 1 ? sums[0][i] : add_i(sums[0][i], sums[kChains - 1][i]);
      y[i] = fma(to_float(sum), mul(factor, set1(t.scale[i * t.x_units + u])), y[i]);
    }
    if (t.shift) {
      const F shift = load(t.shift + 16 * u);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i)
        y[i] = sub(y[i], mul(shift, set1(t.sum[i * t.x_units + u])));
    }
    col += t.unit;
    if (col == 64) {
      col = 0;
      slab += t.x_stride;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) store(t.y + 16 * i, y[i]);
}

// The largest tile of up to `rows` rows; returns how many it took.
template <class Panel, int M = kTileRows>
static inline int64_t multiply_largest_tile(const Panel& panel, const Tile& t, int64_t rows) {
  if constexpr (M > 1) {
    // 12, 8, 6 and 4 to 1: what remains is made up of these.
    if (rows < M)
      return multiply_largest_tile<Panel, M == 12 ? 8 : M == 8 ? 6 : M == 6 ? 4 : M - 1>(panel, t,
                                                                                         rows);
  }
  multiply_tile<Panel, M>(panel, t);
  return M;
}

// factors and shifts [units][16] of sixteen rows. `rows`: 2 * 16 * units floats.
template <class Codec, bool kShifted>
static inline void load_panel_units(const PackedView& w, const Activations& x, int64_t row,
                                    const OperandRange* ranges, float* rows, float* factor,
                                    float* shift) {
  const int64_t units = x.units;
  for (int64_t i = 0; i < 16; ++i) {
    for_each_unit<Codec::kBits, kShifted>(
        w, row + i < w.rows ? row + i : w.rows - 1, x.unit, units, ranges[i],
        [&](int64_t u, F factors, F shifts) {
          store(rows + i * units + u, factors);
          if constexpr (kShifted) store(rows + (16 + i) * units + u, shifts);
        });
  }
  const auto transpose_to = [&](const float* from, float* to) {
    for (int64_t u = 0; u < units; u += 16) {
      I block[16];
      for (int i = 0; i < 16; ++i) block[i] = load_i(from + i * units + u);
      transpose(block);
      for (int i = 0; i < 16; ++i) store_i(to + (u + i) * 16, block[i]);
    }
  };
  transpose_to(rows, factor);
  if constexpr (kShifted) transpose_to(rows + 16 * units, shift);
}

template <class Codec, class Panel>
static void multiply_panel_as(const PackedView& w, const Activations& x, int64_t row,
                              const Codec* codecs, const OperandRange* ranges, void* scratch,
                              float* y) {
  constexpr int64_t kBlockCols = 16 * kColsPerLane<Codec::kBits>;
  constexpr int64_t kCols = kPanelBlocks * kBlockCols;
  uint8_t* weights = static_cast<uint8_t*>(scratch);
  float* factor = reinterpret_cast<float*>(weights + 16 * kPanelBlocks * Panel::kLaneBytes);
  float* shift = factor + 16 * x.units;
  const bool shifted = has_shift<Codec::kBits>(w, ranges[0].offset);
  (shifted ? load_panel_units<Codec, true> : load_panel_units<Codec, false>)(
      w, x, row, ranges, shift + 16 * x.units, factor, shift);
  const Panel panel{codecs[0]};
  const int64_t whole = whole_blocks<Codec>(w);
  const int64_t slab_bytes = x.layout->block_bytes;
  const int64_t blocks = (w.cols + kBlockCols - 1) / kBlockCols, row_end = 64 * blocks;
  const uint8_t* rows[16];
  for (int64_t i = 0; i < 16; ++i)
    rows[i] = w.codes + (row + i < w.rows ? row + i : w.rows - 1) * w.row_bytes;
  for (int64_t col = 0; col < w.cols; col += kCols) {
    uint8_t* to = weights;
    for (int64_t b = col / kBlockCols; b < (col + kCols) / kBlockCols && b * kBlockCols < w.cols;
         ++b, to += 16 * Panel::kLaneBytes) {
      // What comes next is asked for: into the first cache what the next turn takes, into the second
      // the next panel. Neither need exist.
      const int64_t far = 16 * w.row_bytes + 64 * b;
      const int64_t near = 64 * (b + kPanelBlocks) < row_end ? 64 * (b + kPanelBlocks)
                                                             : far - 64 * (blocks - kPanelBlocks);
      if (b < whole) {
        const auto load = [&](int i) {
          prefetch(rows[i] + near);
          prefetch_far(rows[i] + far);
          return load_stored<Codec>(w, rows[i], b);
        };
        Panel::place(load, codecs, to);
      } else {
        Panel::place([&](int i) { return load_stored_tail<Codec>(w, rows[i], b); }, codecs, to);
      }
    }
    const int64_t first = col / x.unit;
    Tile t{};
    t.weights = weights;
    t.factor = factor + 16 * first;
    t.shift = shifted ? shift + 16 * first : nullptr;
    t.x_stride = x.rows * slab_bytes;
    t.x_units = x.units;
    t.units = ((w.cols - col < kCols ? w.cols - col : kCols) + x.unit - 1) / x.unit;
    t.unit = x.unit;
    for (int64_t m = 0; m < x.rows;) {
      t.x = x.data + (col / 64 * x.rows + m) * slab_bytes;
      t.scale = x.scale + m * x.units + first;
      t.sum = x.sum + m * x.units + first;
      t.y = y + 16 * m;
      m += multiply_largest_tile(panel, t, x.rows - m);
    }
  }
}

// y[i, r] += for every row of x and those of the rows [row, row + 16) of w that exist.
template <class Codec>
static void multiply_panel_with(const PackedView& w, const Activations& x, int64_t row,
                                void* scratch, float* y) {
  const bool own_table = w.family == Family::kLearnedCodebook && w.scale_row_stride != 0;
  Codec codecs[16];
  OperandRange ranges[16];
  ranges[0] = codecs[0].prepare(w, row);
  for (int64_t i = 1; i < 16; ++i) {
    codecs[i] = codecs[0];
    ranges[i] = own_table && row + i < w.rows ? codecs[i].prepare(w, row + i) : ranges[0];
  }
  if (own_table || (kExpandingCosts && x.rows > kTileRows)) {
    multiply_panel_as<Codec, ExpandedPanel<Codec>>(w, x, row, codecs, ranges, scratch, y);
  } else {
    multiply_panel_as<Codec, PackedPanel<Codec>>(w, x, row, codecs, ranges, scratch, y);
  }
}
