// A tile of a product: some rows of activations, and the rows of one or two panels of a weight,
// which sit in the lanes of a vector. Where there are registers for it, two panels go together and
// share what is broadcast. Where the target can, codes are expanded in the shadow of the products,
// so that even a second and third look at them is free; else once per panel (kExpandingCosts), as
// where a span is several units. Included by each target.

constexpr int kTileWidth = 16 * kTilePanels;  // rows of the weight

// What a tile asks of the codes of a panel, in either form below.
template <class Codec>
struct PanelOf {
  static constexpr int kBits = Codec::kBits;
  static constexpr int kParts = Codec::kParts;
  static constexpr bool kWords = Codec::kWords;
  static constexpr bool kSmall = Codec::kSmall;
  Codec codec;
};

// Codes as they lie in a panel (core/layout.h), expanded as they are used. Third bits lie there as
// they are stored, in scratch spread already, a vector a lane.
template <class Codec, bool kThirdsSpread>
struct PackedPanel : PanelOf<Codec> {
  static constexpr bool kPacked = true, kScaled = false;
  static constexpr int kLaneBytes = 64;
  static constexpr int kPlaced = kTilePanels * kLaneBytes;  // from lane to lane in scratch

  // `row(i)`: a stored vector of row i.
  template <class Row>
  static inline void place(const Row& row, const Codec*, uint8_t* lanes, uint8_t* thirds) {
    I low[16], high[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const Stored codes = row(i);
      low[i] = codes.low;
      high[i] = codes.high;
    }
    transpose(low);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store_i(lanes + kPlaced * i, low[i]);
    if constexpr (Codec::kBits == 3) {
      transpose(high);
      for (int i = 0; i < 16; ++i) store_i(thirds + kPlaced * i, high[i]);
    }
  }
  // The lane `at` bytes on.
  Stored load(const uint8_t* lanes, const uint8_t* thirds, int64_t at) const {
    const I low = load_i(lanes + at);
    if constexpr (Codec::kBits != 3) return {low, low};
    if constexpr (kThirdsSpread) return {low, load_i(thirds + at)};
    return {low, Codec::spread(load_half_i(thirds + at / 2))};
  }
  I part(const uint8_t*, const Stored& codes, int p) const { return this->codec.part(codes, p); }
};

// The same, expanded beforehand: where each row has its own levels, and where expanding is not for
// free.
template <class Codec>
struct ExpandedPanel : PanelOf<Codec> {
  static constexpr bool kPacked = false, kScaled = false;
  static constexpr int kLaneBytes = 64 * Codec::kParts;
  static constexpr int kPlaced = kTilePanels * kLaneBytes;

  template <class Row>
  static inline void place(const Row& row, const Codec* codecs, uint8_t* to, uint8_t*) {
    Stored codes[16];
    for (int i = 0; i < 16; ++i) codes[i] = row(i);
    for (int p = 0; p < Codec::kParts; ++p) {
      I lanes[16];
      for (int i = 0; i < 16; ++i) lanes[i] = codecs[i].part(codes[i], p);
      transpose(lanes);
      for (int i = 0; i < 16; ++i) store_i(to + kPlaced * i + 64 * p, lanes[i]);
    }
  }
  Stored load(const uint8_t*, const uint8_t*, int64_t) const { return Stored(); }
  I part(const uint8_t* lane, const Stored&, int p) const { return load_i(lane + 64 * p); }
};

// The same, of words that share a scale with all of their span (kernels/shares-inl.h).
template <class Codec>
struct ScaledPanel : ExpandedPanel<Codec> {
  static constexpr bool kScaled = true;
};

// A piece of the product: M rows of activations, kTileWidth of the weight, and so many units of
// columns. Integers are summed over so many units at a time; the floats at the first of them count.
struct Tile {
  const float* factor;  // [units][kTileWidth]
  const float* shift;   // likewise, or null
  const uint8_t* x;     // [slabs of 64 columns][rows][slab bytes]
  int64_t x_stride;     // bytes from slab to slab
  const float* scale;   // [rows][x_units]
  const float* sum;
  int64_t x_units;
  int64_t units, span_units, unit;
  float* y;              // [rows][kTileWidth]
  const uint8_t* ahead;  // so many lines of memory to ask for on the way; they need not exist
  int64_t lines;
  const uint8_t* lanes[kTilePanels];   // of a row, so many bytes apart
  const uint8_t* thirds[kTilePanels];  // beside packed ones of 3 bits
  int64_t lane_stride;
};

// Every loop over the tile is unrolled, or its sums would live in memory. Float sums do: they are
// due once per span.
template <class Panel, int M>
static void multiply_tile(const Panel& panel, const Tile& from) {
  constexpr int kSlabBytes = Panel::kWords ? 128 : 64;
  constexpr int kCols = kColsPerLane<Panel::kBits>;
  // A product takes four cycles: few sums would wait for themselves.
  constexpr int kWanted = M * kTilePanels <= 2 ? 4 : M * kTilePanels <= 8 ? 2 : 1;
  constexpr int kChains = kWanted < Panel::kParts ? kWanted : Panel::kParts;
  const Tile t = from;  // what is stored to y cannot change a copy
  const uint8_t *slab = t.x, *ahead = t.ahead;
  int64_t at = 0;                                                // of the lane
  int64_t in_slab = 0;                                           // columns
  const int64_t span_units = Panel::kScaled ? t.span_units : 1;  // a constant where it can be
  // Lines to ask for at each span. (A division of 64 bits would take as long as ten products.)
  const uint32_t wanted = static_cast<uint32_t>(t.lines), units = static_cast<uint32_t>(t.units);
  const int64_t lines = (wanted + units - 1) / units * span_units;
  for (int64_t u = 0; u < t.units; u += span_units) {
    I sums[kChains][M][kTilePanels];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kTilePanels; ++j) sums[c][i][j] = zero_i();
      }
    }
    const int64_t left = t.units - u, in_span = left < span_units ? left : span_units;
    for (int64_t unit = 0; unit < (Panel::kScaled ? in_span : 1); ++unit) {
      const uint8_t* x = slab + in_slab * (kSlabBytes / 64);
      for (int64_t done = 0; done < t.unit; done += kCols) {
        Stored codes[kTilePanels];
#pragma GCC unroll 2
        for (int j = 0; j < kTilePanels; ++j) codes[j] = panel.load(t.lanes[j], t.thirds[j], at);
#pragma GCC unroll 8
        for (int p = 0; p < Panel::kParts; ++p) {
          I w[kTilePanels];
#pragma GCC unroll 2
          for (int j = 0; j < kTilePanels; ++j) w[j] = panel.part(t.lanes[j] + at, codes[j], p);
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
        at += t.lane_stride;
        x += 4 * Panel::kParts;
      }
      in_slab += t.unit;
      if (in_slab == 64) {
        in_slab = 0;
        slab += t.x_stride;
      }
    }
    for (int64_t line = 0; line < lines; ++line) prefetch_far(ahead + 64 * line);
    ahead += 64 * lines;
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
        I sum = sums[0][i][j];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) sum = add_i(sum, sums[c][i][j]);
        F y = fma(to_float(sum), mul(factor[j], scale), load(at));
        if (t.shift) y = fma(shift[j], set1(t.sum[i * t.x_units + u]), y);
        store(at, y);
      }
    }
    // Or the compiler keeps float sums in registers, of which there are none left.
    __asm__ volatile("" ::: "memory");
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
