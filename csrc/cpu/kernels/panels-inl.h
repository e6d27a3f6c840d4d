// Products of many activations with panels of a weight: sixteen rows at once, so that the lanes of
// a vector are rows and activations are broadcast. Where the target can, codes are expanded in the
// shadow of the products, so that even a second and third look at them is free; else once per panel
// (kExpandingCosts). Included by each target.

static_assert(kPanelRows == 16);

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
      for (int i = 0; i < M; ++i) y[i] = sub(y[i], mul(shift, set1(t.sum[i * t.x_units + u])));
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
      return multiply_largest_tile < Panel, M == 12  ? 8
                                            : M == 8 ? 6
                                            : M == 6 ? 4
                                                     : M - 1 > (panel, t, rows);
  }
  multiply_tile<Panel, M>(panel, t);
  return M;
}

// Sixteen rows of the weight on their way through the columns.
template <class Codec, class Panel>
class PanelReader {
 public:
  static constexpr int64_t kBlockCols = 16 * kColsPerLane<Codec::kBits>;
  static constexpr int64_t kCols = kPanelBlocks * kBlockCols;

  void begin(const PackedView& w, const Activations& x, int64_t row, void* scratch) {
    OperandRange ranges[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t r = row + i < w.rows ? row + i : w.rows - 1;
      rows_[i] = w.codes + r * w.row_bytes;
      if (i == 0 || has_own_levels(w)) {
        ranges[i] = codecs_[i].prepare(w, r);
      } else {
        codecs_[i] = codecs_[0];
        ranges[i] = ranges[0];
      }
    }
    weights_ = static_cast<uint8_t*>(scratch);
    factor_ = reinterpret_cast<float*>(weights_ + 16 * kPanelBlocks * Panel::kLaneBytes);
    shift_ = factor_ + 16 * x.units;
    shifted_ = has_shift<Codec::kBits>(w, ranges[0].offset);
    shifted_ ? load_units<true>(w, x, row, ranges) : load_units<false>(w, x, row, ranges);
  }

  // Takes the codes of the columns [col, col + kCols).
  void read(const PackedView& w, int64_t col) {
    const int64_t whole = whole_blocks<Codec>(w);
    const int64_t blocks = (w.cols + kBlockCols - 1) / kBlockCols;
    const int64_t first = col / kBlockCols;
    const int64_t end = first + kPanelBlocks < blocks ? first + kPanelBlocks : blocks;
    uint8_t* to = weights_;
    for (int64_t b = first; b < end; ++b, to += 16 * Panel::kLaneBytes) {
      // What comes next is asked for: into the first cache what the next turn takes, into the
      // second the next panel. Neither need exist.
      const int64_t far = 16 * w.row_bytes + 64 * b;
      const int64_t near =
          b + kPanelBlocks < blocks ? 64 * (b + kPanelBlocks) : far - 64 * (blocks - kPanelBlocks);
      if (b < whole) {
        const auto load = [&](int i) {
          prefetch(rows_[i] + near);
          prefetch_far(rows_[i] + far);
          return load_stored<Codec>(w, rows_[i], b);
        };
        Panel::place(load, codecs_, to);
      } else {
        Panel::place([&](int i) { return load_stored_tail<Codec>(w, rows_[i], b); }, codecs_, to);
      }
    }
  }

  // y[i, 0..16) += for rows [m, m + result) of x and the columns that were read.
  int64_t multiply(const Activations& x, int64_t col, int64_t m, float* y) const {
    const int64_t first = col / x.unit, slab_bytes = x.layout->block_bytes;
    const Tile t = {
        .weights = weights_,
        .factor = factor_ + 16 * first,
        .shift = shifted_ ? shift_ + 16 * first : nullptr,
        .x = x.data + (col / 64 * x.rows + m) * slab_bytes,
        .x_stride = x.rows * slab_bytes,
        .scale = x.scale + m * x.units + first,
        .sum = x.sum + m * x.units + first,
        .x_units = x.units,
        .units = ((x.cols - col < kCols ? x.cols - col : kCols) + x.unit - 1) / x.unit,
        .unit = x.unit,
        .y = y + 16 * m,
    };
    return multiply_largest_tile(Panel{codecs_[0]}, t, x.rows - m);
  }

 private:
  // Factors and shifts [units][16].
  template <bool kShifted>
  void load_units(const PackedView& w, const Activations& x, int64_t row,
                  const OperandRange* ranges) {
    const int64_t units = x.units;
    float* factors_of = shift_ + 16 * units;  // [16][units]
    float* shifts_of = factors_of + 16 * units;
    for (int64_t i = 0; i < 16; ++i) {
      for_each_unit<Codec::kBits, kShifted>(w, row + i < w.rows ? row + i : w.rows - 1, x.unit,
                                            units, ranges[i], [&](int64_t u, F factors, F shifts) {
                                              store(factors_of + i * units + u, factors);
                                              if constexpr (kShifted)
                                                store(shifts_of + i * units + u, shifts);
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
    transpose_to(factors_of, factor_);
    if constexpr (kShifted) transpose_to(shifts_of, shift_);
  }

  Codec codecs_[16];
  const uint8_t* rows_[16];
  uint8_t* weights_;
  float *factor_, *shift_;
  bool shifted_;
};

template <class Codec, class Panel>
static void multiply_panel_as(const PackedView& w, const Activations& x, int64_t row, void* scratch,
                              float* y) {
  PanelReader<Codec, Panel> panel;
  panel.begin(w, x, row, scratch);
  for (int64_t col = 0; col < w.cols; col += PanelReader<Codec, Panel>::kCols) {
    panel.read(w, col);
    for (int64_t m = 0; m < x.rows;) m += panel.multiply(x, col, m, y);
  }
}

template <class Codec>
static void multiply_panel_with(const PackedView& w, const Activations& x, int64_t row,
                                void* scratch, float* y) {
  (has_own_levels(w) || (kExpandingCosts && x.rows > kTileRows)
       ? multiply_panel_as<Codec, ExpandedPanel<Codec>>
       : multiply_panel_as<Codec, PackedPanel<Codec>>)(w, x, row, scratch, y);
}
