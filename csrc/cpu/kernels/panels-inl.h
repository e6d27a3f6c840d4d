// Products of many activations with panels of a weight: sixteen rows at once, so that the lanes of
// a vector are rows and activations are broadcast. Where there are registers for it, two panels go
// together and share what is broadcast. Where the target can, codes are expanded in the shadow of
// the products, so that even a second and third look at them is free; else once per panel
// (kExpandingCosts). Included by each target.

constexpr int kTileWidth = 16 * kTilePanels;  // rows of the weight
constexpr int64_t kPanelVectors = 2;          // of a row that are read at a time

// The codes of a panel, lane by lane of its rows: transposed, and expanded as they are used.
template <class Codec>
struct PackedPanel {
  static constexpr int kBits = Codec::kBits;
  static constexpr int kParts = Codec::kParts;
  static constexpr bool kWords = Codec::kWords;
  static constexpr bool kSmall = Codec::kSmall;
  static constexpr int kLaneBytes = Codec::kBits == 3 ? 128 : 64;
  Codec codec;

  // `row(i)`: the stored codes of row i. Lanes go to every kTilePanels-th place.
  template <class Row>
  static inline void place(const Row& row, const Codec*, uint8_t* to) {
    constexpr int kStride = kTilePanels * kLaneBytes;
    I lanes[16], third[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const Stored codes = row(i);
      lanes[i] = codes.low;
      third[i] = codes.high;
    }
    transpose(lanes);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store_i(to + kStride * i, lanes[i]);
    if constexpr (kBits == 3) {
      transpose(third);
      for (int i = 0; i < 16; ++i) store_i(to + kStride * i + 64, third[i]);
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
      for (int i = 0; i < 16; ++i) store_i(to + kTilePanels * kLaneBytes * i + 64 * p, lanes[i]);
    }
  }
  Stored load(const uint8_t*) const { return Stored(); }
  I part(const uint8_t* lane, const Stored&, int p) const { return load_i(lane + 64 * p); }
};

// A piece of the product: M rows of activations, kTileWidth of the weight, `units` units of
// columns.
struct Tile {
  const uint8_t* weights;  // [lanes of a row][kTilePanels][lane bytes]
  const float* factor;     // [units][kTileWidth]
  const float* shift;      // likewise, or null
  const uint8_t* x;        // [slabs of 64 columns][rows][slab bytes]
  int64_t x_stride;        // bytes from slab to slab
  const float* scale;      // [rows][x_units]
  const float* sum;
  int64_t x_units;
  int64_t units, unit;
  float* y;              // [rows][kTileWidth]
  const uint8_t* ahead;  // memory to ask for on the way, so many lines per unit; need not exist
  int64_t lines;
};

// Every loop over the tile is unrolled, or its sums would live in memory. Float sums do: they are
// due once per unit.
template <class Panel, int M>
static void multiply_tile(const Panel& panel, const Tile& from) {
  constexpr int kSlabBytes = Panel::kWords ? 128 : 64;
  constexpr int kCols = kColsPerLane<Panel::kBits>;
  // A product takes four cycles: few sums would wait for themselves.
  constexpr int kChains = M * kTilePanels <= 8 && Panel::kParts > 1 ? 2 : 1;
  const Tile t = from;  // what is stored to y cannot change a copy
  const uint8_t* lane = t.weights;
  const uint8_t *slab = t.x, *ahead = t.ahead;
  int64_t col = 0;  // of the slab
  for (int64_t u = 0; u < t.units; ++u) {
    I sums[kChains][M][kTilePanels];
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kTilePanels; ++j) sums[c][i][j] = zero_i();
      }
    }
    const uint8_t* x = slab + col * (kSlabBytes / 64);
    for (int64_t done = 0; done < t.unit; done += kCols) {
      Stored codes[kTilePanels];
#pragma GCC unroll 2
      for (int j = 0; j < kTilePanels; ++j) codes[j] = panel.load(lane + j * Panel::kLaneBytes);
#pragma GCC unroll 8
      for (int p = 0; p < Panel::kParts; ++p) {
        I w[kTilePanels];
#pragma GCC unroll 2
        for (int j = 0; j < kTilePanels; ++j)
          w[j] = panel.part(lane + j * Panel::kLaneBytes, codes[j], p);
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) {
          const uint8_t* one = x + i * kSlabBytes + 4 * p;
          I* sum = sums[p % kChains][i];
          if constexpr (kTilePanels == 2) {
            dot_twice_with<Panel::kWords, Panel::kSmall>(&sum[0], &sum[1], w[0], w[1], one);
          } else if constexpr (Panel::kWords) {
            sum[0] = dot_words_with(sum[0], w[0], one);
          } else {
            sum[0] = dot_bytes_with<Panel::kSmall>(sum[0], w[0], one);
          }
        }
      }
      lane += kTilePanels * Panel::kLaneBytes;
      x += 4 * Panel::kParts;
    }
    for (int64_t line = 0; line < t.lines; ++line) prefetch_far(ahead + 64 * line);
    ahead += 64 * t.lines;
    F factor[kTilePanels], shift[kTilePanels];
#pragma GCC unroll 2
    for (int j = 0; j < kTilePanels; ++j) {
      factor[j] = load(t.factor + u * kTileWidth + 16 * j);
      if (t.shift) shift[j] = load(t.shift + u * kTileWidth + 16 * j);
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const F scale = set1(t.scale[i * t.x_units + u]);
#pragma GCC unroll 2
      for (int j = 0; j < kTilePanels; ++j) {
        float* at = t.y + i * kTileWidth + 16 * j;
        const I sum = kChains == 1 ? sums[0][i][j] : add_i(sums[0][i][j], sums[kChains - 1][i][j]);
        F y = fma(to_float(sum), mul(factor[j], scale), load(at));
        if (t.shift) y = fma(shift[j], set1(t.sum[i * t.x_units + u]), y);
        store(at, y);
      }
    }
    // Or the compiler keeps float sums in registers, of which there are none left.
    __asm__ volatile("" ::: "memory");
    col += t.unit;
    if (col == 64) {
      col = 0;
      slab += t.x_stride;
    }
  }
}

// How many rows of activations the next tile takes where `rows` are left: few, but none so small
// that its sums wait for themselves.
static inline int64_t next_tile(int64_t rows) {
  if constexpr (kTileRows < 12) return rows < kTileRows ? rows : kTileRows;
  if (rows >= 18 || rows == 12) return 12;
  if (rows >= 14 || rows == 8) return 8;
  if (rows >= 9 || rows == 6) return 6;
  if (rows == 7 || rows == 4) return 4;
  return rows >= 3 ? 3 : rows;
}
template <class Panel>
static inline void multiply_next_tile(const Panel& panel, const Tile& t, int64_t rows) {
  if constexpr (kTileRows >= 12) {
    if (rows == 12) return multiply_tile<Panel, 12>(panel, t);
    if (rows == 8) return multiply_tile<Panel, 8>(panel, t);
    if (rows == 6) return multiply_tile<Panel, 6>(panel, t);
  }
  if (rows == 4) return multiply_tile<Panel, 4>(panel, t);
  if (rows == 3) return multiply_tile<Panel, 3>(panel, t);
  if (rows == 2) return multiply_tile<Panel, 2>(panel, t);
  multiply_tile<Panel, 1>(panel, t);
}

// Scratch of a panel. A vector of codes becomes at most eight of operands.
struct PanelScratch {
  uint8_t* weights;
  float *factor, *shift;    // [units][kTileWidth]
  float *factors, *shifts;  // [16][units], before they are transposed
  float* decoded;
};
static inline int64_t cut_panel(const PackedView& w, const Activations& x, void* scratch,
                                PanelScratch* to) {
  Cutter cut(scratch);
  to->weights = cut.bytes(kTileWidth * kPanelVectors * 8 * 64);
  to->factor = cut.floats(unit_floats(x, kTileWidth));
  to->shift = cut.floats(unit_floats(x, kTileWidth));
  to->factors = cut.floats(unit_floats(x, 16));
  to->shifts = cut.floats(unit_floats(x, 16));
  to->decoded = cut.floats(decoded_floats(w, 16));
  return cut.cut();
}
static int64_t panel_scratch_bytes(const PackedView& w, const Activations& x) {
  PanelScratch pieces;
  return cut_panel(w, x, nullptr, &pieces);
}

// kTileWidth rows of the weight on their way through the columns.
template <class Codec, class Panel>
class PanelReader {
 public:
  static constexpr int64_t kVectorCols = 16 * kColsPerLane<Codec::kBits>;
  static constexpr int64_t kCols = kPanelVectors * kVectorCols;

  void begin(const PackedView& w, const Activations& x, int64_t row, void* scratch) {
    OperandRange ranges[kTileWidth];
    for (int64_t i = 0; i < kTileWidth; ++i) {
      const int64_t r = row + i < w.rows ? row + i : w.rows - 1;
      rows_[i] = w.codes + r * w.row_bytes;
      if (i == 0 || has_own_levels(w)) {
        ranges[i] = codecs_[i].prepare(w, r);
      } else {
        codecs_[i] = codecs_[0];
        ranges[i] = ranges[0];
      }
    }
    cut_panel(w, x, scratch, &pieces_);
    shifted_ = has_shift<Codec::kBits>(w, ranges[0].offset);
    for (int64_t j = 0; j < kTileWidth; j += 16) load_panel_units(w, x, row, j, ranges + j);
  }

  // Takes the codes of the columns [col, col + kCols).
  void read(const PackedView& w, int64_t col) {
    const int64_t whole = whole_vectors<Codec>(w);
    const int64_t blocks = (w.cols + kVectorCols - 1) / kVectorCols;
    const int64_t first = col / kVectorCols;
    const int64_t end = first + kPanelVectors < blocks ? first + kPanelVectors : blocks;
    uint8_t* to = pieces_.weights;
    for (int64_t b = first; b < end; ++b, to += 16 * kTilePanels * Panel::kLaneBytes) {
      // What the next turn takes is asked for into the first cache. It need not exist.
      const int64_t near = b + kPanelVectors < blocks
                               ? 64 * (b + kPanelVectors)
                               : kTileWidth * w.row_bytes + 64 * (b + kPanelVectors - blocks);
      const int64_t near_bits =
          near < w.row_bytes ? near / 2
                             : kTileWidth * w.row_bytes + (near - kTileWidth * w.row_bytes) / 2;
      for (int j = 0; j < kTilePanels; ++j) {
        const uint8_t* const* rows = rows_ + 16 * j;
        uint8_t* place = to + j * Panel::kLaneBytes;
        if (b < whole) {
          const auto load = [&](int i) {
            prefetch(rows[i] + near);
            if (Codec::kBits == 3 && b % 2 == 0) prefetch(rows[i] + w.plane_bytes + near_bits);
            return load_stored<Codec>(w, rows[i], b);
          };
          Panel::place(load, codecs_ + 16 * j, place);
        } else {
          const auto load = [&](int i) { return load_stored_tail<Codec>(w, rows[i], b); };
          Panel::place(load, codecs_ + 16 * j, place);
        }
      }
    }
  }

  // y[i, 0..kTileWidth) += for rows [m, m + result) of x and the columns that were read.
  int64_t multiply(const PackedView& w, const Activations& x, int64_t col, int64_t m,
                   float* y) const {
    const int64_t first = col / x.unit, slab_bytes = x.layout->block_bytes;
    const int64_t units = ((x.cols - col < kCols ? x.cols - col : kCols) + x.unit - 1) / x.unit;
    // The next panels are asked for into the second cache, byte after byte as they lie: as many as
    // this turn took, by its first tiles, a few at a time. (All at once would keep other loads
    // waiting.)
    constexpr int64_t kVectorBytes = Codec::kBits == 3 ? 96 : 64;
    const int64_t vectors = kTileWidth * ((units * x.unit + kVectorCols - 1) / kVectorCols);
    const int64_t lines = vectors * kVectorBytes / 64;
    const int64_t asking = x.rows < 4 * kTileRows ? x.rows : 4 * kTileRows;
    const int64_t rows = next_tile(x.rows - m);
    const auto asked = [&](int64_t done) {
      return lines * (done < asking ? done : asking) / asking;
    };
    const Tile t = {
        .weights = pieces_.weights,
        .factor = pieces_.factor + kTileWidth * first,
        .shift = shifted_ ? pieces_.shift + kTileWidth * first : nullptr,
        .x = x.data + (col / 64 * x.rows + m) * slab_bytes,
        .x_stride = x.rows * slab_bytes,
        .scale = x.scale + m * x.units + first,
        .sum = x.sum + m * x.units + first,
        .x_units = x.units,
        .units = units,
        .unit = x.unit,
        .y = y + kTileWidth * m,
        .ahead = rows_[0] + kTileWidth * (w.row_bytes + col / kVectorCols * kVectorBytes) +
                 64 * asked(m),
        .lines = (asked(m + rows) - asked(m) + units - 1) / units,
    };
    multiply_next_tile(Panel{codecs_[0]}, t, rows);
    return rows;
  }

 private:
  // Factors and shifts of sixteen rows from row + j: [units][kTileWidth], from column j.
  void load_panel_units(const PackedView& w, const Activations& x, int64_t row, int64_t j,
                        const OperandRange* ranges) {
    const int64_t units = x.units, left = w.rows - row - j;
    const int64_t n = left < 1 ? 1 : left < 16 ? left : 16;  // rows that do not exist repeat others
    load_units<Codec::kBits>(w, left < 1 ? w.rows - 1 : row + j, n, x.unit, units, ranges,
                             pieces_.decoded, pieces_.factors, shifted_ ? pieces_.shifts : nullptr);
    const auto transpose_to = [&](const float* from, float* to) {
      for (int64_t u = 0; u < units; u += 16) {
        I block[16];
        for (int64_t i = 0; i < 16; ++i) block[i] = load_i(from + (i < n ? i : 0) * units + u);
        transpose(block);
        for (int i = 0; i < 16; ++i) store_i(to + (u + i) * kTileWidth + j, block[i]);
      }
    };
    transpose_to(pieces_.factors, pieces_.factor);
    if (shifted_) transpose_to(pieces_.shifts, pieces_.shift);
  }

  Codec codecs_[kTileWidth];
  const uint8_t* rows_[kTileWidth];
  PanelScratch pieces_;
  bool shifted_;
};

template <class Codec, class Panel>
static void multiply_panel_as(const PackedView& w, const Activations& x, int64_t row, void* scratch,
                              float* y) {
  PanelReader<Codec, Panel> panel;
  panel.begin(w, x, row, scratch);
  for (int64_t col = 0; col < w.cols; col += PanelReader<Codec, Panel>::kCols) {
    panel.read(w, col);
    for (int64_t m = 0; m < x.rows;) m += panel.multiply(w, x, col, m, y);
  }
}

template <class Codec>
static void multiply_panel_with(const PackedView& w, const Activations& x, int64_t row,
                                void* scratch, float* y) {
  (has_own_levels(w) || (kExpandingCosts && x.rows > kTileRows)
       ? multiply_panel_as<Codec, ExpandedPanel<Codec>>
       : multiply_panel_as<Codec, PackedPanel<Codec>>)(w, x, row, scratch, y);
}
