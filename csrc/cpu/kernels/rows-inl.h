// The product of a few rows of activations with rows of a weight, one or two at a time: a stream of
// memory. Included by each target.

template <Operand kOperand>
constexpr int kPartBytes = kOperand == Operand::kTwoBytes ? 128 : 64;

// sum[j][i] = the integer product of a block of row j of the weight and row i of x.
// `codes`: [kW][kTurned], turned; `x`: [kX][kTurned][parts].
template <class Codec, Operand kOperand, int kTurned, int kX, int kW>
[[gnu::always_inline]] static inline void block_products(const Codec* const* codecs,
                                                         const Stored (*codes)[kTurned],
                                                         const uint8_t* x, I (*sum)[kX]) {
  constexpr bool kTwo = kOperand == Operand::kTwoBytes;
  constexpr int kPlanes = kTwo ? 2 : 1;
  // Two products begin in a cycle and take four, so eight sums at least must wait for none of the
  // others; and some more for when memory is late (measured with four rows of x: 4 %). With one row
  // four do, for the stream is what counts. From three rows of x on codes of 3 bits leave no
  // registers for a second.
  constexpr int kChains = kX == 1 ? 4 / kPlanes : kX > 2 && Codec::kBits == 3 ? 1 : 2;
  constexpr int kPart = kPartBytes<kOperand>;
  I sums[kPlanes][kChains][kW][kX];
#pragma GCC unroll 2
  for (int plane = 0; plane < kPlanes; ++plane)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
      for (int j = 0; j < kW; ++j)
        for (int i = 0; i < kX; ++i) sums[plane][c][j][i] = zero_i();
#pragma GCC unroll 4
  for (int t = 0; t < kTurned; ++t) {
#pragma GCC unroll 8
    for (int p = 0; p < Codec::kParts; ++p) {
      I w[kW];
#pragma GCC unroll 2
      for (int j = 0; j < kW; ++j) w[j] = codecs[j]->part(codes[j][t], p);
#pragma GCC unroll 4
      for (int i = 0; i < kX; ++i) {
        const uint8_t* of = x + (i * kTurned + t) * Codec::kParts * kPart + p * kPart;
#pragma GCC unroll 2
        for (int plane = 0; plane < kPlanes; ++plane) {
          constexpr bool kWords = kOperand == Operand::kWords;
          auto& to = sums[plane][(t * Codec::kParts + p) % kChains];
          if constexpr (kW == 2) {
            dot_twice<kWords, Codec::kSmall>(&to[0][i], &to[1][i], w[0], w[1], of + 64 * plane);
          } else if constexpr (kWords) {
            to[0][i] = dot_words(to[0][i], w[0], load_i(of));
          } else {
            to[0][i] = dot_bytes<Codec::kSmall>(to[0][i], w[0], load_i(of + 64 * plane));
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kW; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kX; ++i) {
      I of[kPlanes];
#pragma GCC unroll 2
      for (int plane = 0; plane < kPlanes; ++plane) {
        of[plane] = sums[plane][0][j][i];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) of[plane] = add_i(of[plane], sums[plane][c][j][i]);
      }
      sum[j][i] = kTwo ? add_i(shift_left_i(of[0], 8), of[kPlanes - 1]) : of[0];
    }
  }
}

// Rows of the weight that go together: not for one row of activations, where nothing counts but the
// stream, and one stream is what the CPU follows best.
static_assert(kWalkedRows <= kMostWalkedRows);
template <int kX>
constexpr int kRowsAtOnce = kX == 1 ? 1 : kRowsTogether;

// Where codes are asked for: so many bytes beyond the row that is read lies the row that will want
// them, and so many vectors along it its block. (A vector is 64 bytes of one plane of 3-bit codes
// and 32 of the other, rows are the same for both.)
struct Ahead {
  int64_t row_bytes, vectors;
};
// One stream is asked into the second cache (measured: a fifth faster when both cores wait for
// memory), two into the first, where lines are needed at once. Inlined by force, like prefetch.
template <int kW>
[[gnu::always_inline]] static inline void ask_for(const uint8_t* p) {
  if constexpr (kW == 1) {
    prefetch_far(p);
  } else {
    prefetch(p);
  }
}

// A block of kW rows of a weight from vector `first` on, turned. What is asked for need not exist.
template <class Codec, int kTurned, int kW>
[[gnu::always_inline]] static inline void load_block(const PackedView& w,
                                                     const uint8_t* const* rows, int64_t first,
                                                     const Ahead& ahead, Stored (*codes)[kTurned]) {
#pragma GCC unroll 2
  for (int j = 0; j < kW; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kTurned; ++v) {
      const int64_t vector = first + v, wanted = vector + ahead.vectors;
      ask_for<kW>(rows[j] + ahead.row_bytes + 64 * wanted);
      if (Codec::kBits == 3 && wanted % 2 == 0)
        ask_for<kW>(rows[j] + ahead.row_bytes + w.plane_bytes + 32 * wanted);
      codes[j][v] = load_stored<Codec>(w, rows[j], vector);
    }
    turn<Codec, kTurned>(codes[j]);
  }
}
// The last one of a row.
template <class Codec, int kTurned, int kW>
static inline void load_last_block(const PackedView& w, const uint8_t* const* rows, int64_t first,
                                   Stored (*codes)[kTurned]) {
  constexpr int64_t kCols = 16 * kColsPerLane<Codec::kBits>;
  const int64_t whole = w.cols / kCols, vectors = (w.cols + kCols - 1) / kCols;
  for (int j = 0; j < kW; ++j) {
    for (int v = 0; v < kTurned; ++v) {
      const int64_t at = first + v;
      codes[j][v] = at < whole     ? load_stored<Codec>(w, rows[j], at)
                    : at < vectors ? load_stored_tail<Codec>(w, rows[j], at)
                                   : Stored{zero_i(), zero_i()};
    }
    turn<Codec, kTurned>(codes[j]);
  }
}

constexpr int64_t kRunRows = 16;  // rows of the weight that are prepared at a time

// What the walk needs besides the weight and the activations, in scratch.
struct RowWalk {
  I unit_of_lane;       // within a block
  float* x_scale;       // [blocks][rows of x][16], by lanes
  float* sums;          // [rows of x][kRunRows][16]
  float* factors;       // [kRunRows][units]
  float* shifts;        // likewise, or null
  float* next_factors;  // those of the next run
  float* next_shifts;
  float* decoded;

  void take_next() {
    float *const old_factors = factors, *const old_shifts = shifts;
    factors = next_factors;
    next_factors = old_factors;
    if (!shifts) return;
    shifts = next_shifts;
    next_shifts = old_shifts;
  }
};
static inline int64_t cut_rows(const PackedView& w, const Activations& x, void* scratch,
                               RowWalk* to) {
  Cutter cut(scratch);
  to->x_scale = cut.floats(x.blocks * x.rows * 16);
  to->sums = cut.floats(x.rows * kRunRows * 16);
  to->factors = cut.floats(unit_floats(x, kRunRows));
  to->shifts = cut.floats(unit_floats(x, kRunRows));
  to->next_factors = cut.floats(unit_floats(x, kRunRows));
  to->next_shifts = cut.floats(unit_floats(x, kRunRows));
  to->decoded = cut.floats(decoded_floats(w, kRunRows));
  return cut.cut();
}
static int64_t rows_scratch_bytes(const PackedView& w, const Activations& x) {
  RowWalk pieces;
  return cut_rows(w, x, nullptr, &pieces);
}

// With one row of x, scales of the next run are decoded while this one is walked, of so many rows
// at a time. If all of that came at once, memory would have nothing to do meanwhile, and it is what
// is waited for (measured: up to 15 % of the time where it is quick, nothing lost where it is
// slow). Rows of fewer units are not worth what begins each call.
constexpr int kPreparedRows = 4;
constexpr int64_t kLeastPreparedUnits = 64;

// y[i * ldy + r] += for the `n` rows of w from `row`, r < n, and the kX rows of x. prepare(r) is
// called once kPreparedRows rows from r on are done.
template <class Codec, Operand kOperand, int kTurned, int kX, class Prepare>
[[gnu::noinline]] static void multiply_run(const Codec* codecs, const PackedView& w,
                                           const Activations& x, const RowWalk& walk, int64_t row,
                                           int64_t n, float* y, int64_t ldy,
                                           const Prepare& prepare) {
  constexpr int kW = kRowsAtOnce<kX>;
  static_assert(kRunRows % kW == 0);
  constexpr int kBlockBytes = kTurned * Codec::kParts * kPartBytes<kOperand>;
  // So many blocks at a time that activations stay in the first cache while the run passes, even as
  // two streams come and go (measured: with twice as many, a quarter slower).
  constexpr int64_t kCache = kX == 1 ? 32768 : 16384;
  constexpr int64_t kChunk = kCache / (kX * kBlockBytes);
  const bool in_chunks = kChunk < x.blocks;
  // The walk goes down the rows of a run chunk by chunk, and run by run, and asks for what comes
  // some two pages later, in time for the page table to be walked. The CPU does not see by itself
  // that two rows are streams, and not beyond the end of a page or of a chunk.
  constexpr int64_t kFar = 8192;
  const int64_t step_bytes = 64 * kTurned * kW * (in_chunks ? kChunk : x.blocks);
  int64_t rows_ahead = step_bytes < kFar ? kFar / step_bytes * kW : kW;
  if (in_chunks && rows_ahead > kRunRows) rows_ahead = kRunRows;
  // Copies: what is stored to sums might else change them.
  float* const sums = walk.sums;
  const float *const x_scale = walk.x_scale, *const shifts = walk.shifts;
  const I unit_of_lane = walk.unit_of_lane;
  const int64_t units = x.units, units_per_block = x.layout->block_cols / x.unit;
  const int64_t whole = whole_vectors<Codec>(w) / kTurned;
  for (int i = 0; i < kX; ++i) {
    for (int64_t r = 0; r < kRunRows; ++r) {
      F sum = zero();
      for (int64_t u = 0; shifts && r < n && u < units; u += 16)
        sum = fma(load(shifts + r * units + u), load(x.sum + i * units + u), sum);
      store(sums + (i * kRunRows + r) * 16, sum);
    }
  }
  for (int64_t chunk = 0; chunk < x.blocks; chunk += kChunk) {
    const int64_t end = chunk + kChunk < x.blocks ? chunk + kChunk : x.blocks;
    for (int64_t r = 0; r < n; r += kW) {
      const Codec* of_rows[kW];
      const uint8_t* rows[kW];
      const float* factors[kW];
      float* to[kW];
      for (int j = 0; j < kW; ++j) {
        const int64_t at = r + j < n ? r + j : r;
        of_rows[j] = codecs + (has_own_levels(w) ? at : 0);
        rows[j] = w.codes + (row + at) * w.row_bytes;
        factors[j] = walk.factors + at * units;
        to[j] = sums + (r + j) * 16;  // of a row that is not there too
      }
      // In this chunk, in the next one, or in the next run.
      Ahead ahead{rows_ahead * w.row_bytes, 0};
      if (r + rows_ahead >= kRunRows) {
        ahead.vectors = kTurned * (end == x.blocks ? -chunk : kChunk);
        if (end != x.blocks) ahead.row_bytes -= kRunRows * w.row_bytes;
      }
      for (int64_t b = chunk; b < end; ++b) {
        Stored codes[kW][kTurned];
        if (b < whole) {
          load_block<Codec, kTurned, kW>(w, rows, b * kTurned, ahead, codes);
        } else {
          load_last_block<Codec, kTurned, kW>(w, rows, b * kTurned, codes);
        }
        I products[kW][kX];
        block_products<Codec, kOperand, kTurned, kX, kW>(of_rows, codes,
                                                         x.data + b * kX * kBlockBytes, products);
#pragma GCC unroll 2
        for (int j = 0; j < kW; ++j) {
          const F scale = lookup(load(factors[j] + b * units_per_block), unit_of_lane);
#pragma GCC unroll 4
          for (int i = 0; i < kX; ++i) {
            const F both = mul(scale, load(x_scale + (b * kX + i) * 16));
            float* sum = to[j] + i * kRunRows * 16;
            store(sum, fma(to_float(products[j][i]), both, load(sum)));
          }
        }
      }
      if constexpr (kX == 1) {
        if (chunk == 0 && (r + kW) % kPreparedRows == 0) prepare(r + kW - kPreparedRows);
      }
    }
  }
  for (int i = 0; i < kX; ++i) {
    float* to = y + i * ldy;
    const F all = add_lanes(sums + i * kRunRows * 16);
    store_part(to, add(load_part(to, static_cast<int>(n)), all), static_cast<int>(n));
  }
}

// y[i * ldy + r - begin] += for the rows [begin, end) of w.
template <class Codec, Operand kOperand, int kTurned>
static inline void multiply_rows_as(const PackedView& w, const Activations& x, int64_t begin,
                                    int64_t end, void* scratch, float* y, int64_t ldy) {
  Codec codecs[kRunRows];
  OperandRange ranges[kRunRows];
  ranges[0] = codecs[0].prepare(w, begin);
  for (int j = 1; j < kRunRows; ++j) ranges[j] = ranges[0];
  RowWalk walk;
  cut_rows(w, x, scratch, &walk);
  if (!has_shift<Codec::kBits>(w, ranges[0].offset)) walk.shifts = nullptr;
  int32_t unit_of_lane[16];
  for (int i = 0; i < 16; ++i)
    unit_of_lane[i] = static_cast<int32_t>(x.layout->first_col_of_lane[i] / x.unit);
  walk.unit_of_lane = load_i(unit_of_lane);
  const int64_t units_per_block = x.layout->block_cols / x.unit;
  for (int64_t b = 0; b < x.blocks; ++b) {
    for (int64_t i = 0; i < x.rows; ++i) {
      const F scales =
          load_part(x.scale + i * x.units + b * units_per_block, static_cast<int>(units_per_block));
      store(walk.x_scale + (b * x.rows + i) * 16, lookup(scales, walk.unit_of_lane));
    }
  }
  const auto load = [&](int64_t row, int64_t rows, float* factors, float* shifts) {
    load_units<Codec::kBits>(w, row, rows, x.unit, x.units, ranges, walk.decoded, factors, shifts);
  };
  const bool prepares = x.rows == 1 && x.units >= kLeastPreparedUnits && !has_own_levels(w);
  for (int64_t row = begin; row < end; row += kRunRows) {
    const int64_t n = end - row < kRunRows ? end - row : kRunRows;
    if (has_own_levels(w))
      for (int64_t j = 0; j < n; ++j) ranges[j] = codecs[j].prepare(w, row + j);
    if (row == begin || !prepares) load(row, n, walk.factors, walk.shifts);
    ask_for_units(w, row + (prepares ? 2 : 1) * kRunRows, kRunRows);
    const auto prepare = [&](int64_t r) {
      const int64_t next = row + kRunRows + r, rows = end - next, at = r * x.units;
      if (prepares && rows > 0)
        load(next, rows < kPreparedRows ? rows : kPreparedRows, walk.next_factors + at,
             walk.shifts ? walk.next_shifts + at : nullptr);
    };
    const auto multiply = [&](auto rows) {
      multiply_run<Codec, kOperand, kTurned, decltype(rows)::value>(codecs, w, x, walk, row, n,
                                                                    y + row - begin, ldy, prepare);
    };
    if (x.rows == 1) {
      multiply(Count<1>());
    } else if constexpr (kWalkedRows > 1 && kOperand != Operand::kTwoBytes) {
      if (x.rows == 2) multiply(Count<2>());
      if (x.rows == 3) multiply(Count<3>());
      if (x.rows == 4) multiply(Count<4>());
    }
    if (prepares) walk.take_next();
  }
}

template <class Codec, Operand kOperand>
static inline void multiply_rows_of(const PackedView& w, const Activations& x, int64_t begin,
                                    int64_t end, void* scratch, float* y, int64_t ldy) {
  const int turned = x.layout->turned;
  if constexpr (Codec::kBits <= 3) {
    if (turned == 1) return multiply_rows_as<Codec, kOperand, 1>(w, x, begin, end, scratch, y, ldy);
  }
  if constexpr (Codec::kBits <= 4) {
    if (turned == 2) return multiply_rows_as<Codec, kOperand, 2>(w, x, begin, end, scratch, y, ldy);
  }
  multiply_rows_as<Codec, kOperand, 4>(w, x, begin, end, scratch, y, ldy);
}
