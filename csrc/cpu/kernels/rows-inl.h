// The product of a few rows of activations with rows of a weight, one after another: a stream of
// memory. Included by each target.

// Several rows of activations no longer fit the first cache beside that stream; two rows of the
// weight, read in turn, halve what is loaded of them.
template <int kX>
constexpr int kRowsTogether = kX == 1 ? 1 : 2;

// Bytes of a row of activations in a block.
template <class Codec, Operand kOperand>
constexpr int kBlockBytes = 16 * kColsPerLane<Codec::kBits>*(kOperand == Operand::kBytes ? 1 : 2);

// sum[j][i] = the integer product of a block of row j of the weight and row i of x [kX, bytes].
template <class Codec, Operand kOperand, int kX, int kW>
[[gnu::always_inline]] static inline void block_products(const Codec* codecs, const Stored* codes,
                                                         const uint8_t* x, I (*sum)[kX]) {
  for (int j = 0; j < kW; ++j)
    for (int i = 0; i < kX; ++i) sum[j][i] = zero_i();
  if constexpr (kOperand == Operand::kTwoBytes) {
    static_assert(kX == 1 && kW == 1);
    I low = zero_i();
#pragma GCC unroll 8
    for (int p = 0; p < Codec::kParts; ++p) {
      const I w = codecs->part(*codes, p);
      sum[0][0] = dot_bytes<Codec::kSmall>(sum[0][0], w, load_i(x + 128 * p));
      low = dot_bytes<Codec::kSmall>(low, w, load_i(x + 128 * p + 64));
    }
    sum[0][0] = add_i(shift_left_i(sum[0][0], 8), low);
    return;
  }
#pragma GCC unroll 8
  for (int p = 0; p < Codec::kParts; ++p) {
    I w[kW];
    for (int j = 0; j < kW; ++j) w[j] = codecs[j].part(codes[j], p);
#pragma GCC unroll 4
    for (int i = 0; i < kX; ++i) {
      const uint8_t* of = x + i * kBlockBytes<Codec, kOperand> + 64 * p;
      if constexpr (kW == 2) {
        dot_twice<kOperand == Operand::kWords, Codec::kSmall>(&sum[0][i], &sum[1][i], w[0], w[1],
                                                              of);
      } else if constexpr (kOperand == Operand::kWords) {
        sum[0][i] = dot_words(sum[0][i], w[0], load_i(of));
      } else {
        sum[0][i] = dot_bytes<Codec::kSmall>(sum[0][i], w[0], load_i(of));
      }
    }
  }
}

// The CPU follows a stream by itself, but not over the end of a page, nor two streams in turn (the
// planes of 3-bit codes, two rows). A page ahead is time enough for the page table to be walked.
// Of `together` rows each goes on where all of them have ended.
template <class Codec>
[[gnu::always_inline]] static inline void ask_ahead(const PackedView& w, const uint8_t* row,
                                                    int64_t block, int together) {
  constexpr int64_t kPage = 4096;
  const int64_t at = 64 * block + kPage;
  prefetch_far(row + at + (at >= w.row_bytes ? (together - 1) * w.row_bytes : 0));
  if (Codec::kBits == 3 && block % 2 == 0) prefetch_far(row + w.plane_bytes + 32 * block + kPage);
}

// y[i * ldy + r - begin] += for the rows [begin, end) of w and the kX rows of x.
// `factor`: kX * kRowsTogether * units + 16 floats.
template <class Codec, Operand kOperand, bool kShifted, int kX>
static void multiply_rows_with(const PackedView& w, const Activations& x, int64_t begin,
                               int64_t end, float* factor, float* y, int64_t ldy) {
  constexpr int kW = kRowsTogether<kX>;
  const int64_t units = x.units, units_per_block = x.layout->block_cols / x.unit;
  const int64_t whole = whole_blocks<Codec>(w), blocks = x.blocks;
  int32_t unit_of_lane[16];
  for (int64_t i = 0; i < 16; ++i)
    unit_of_lane[i] = static_cast<int32_t>(i * kColsPerLane<Codec::kBits> / x.unit);
  const I lanes = load_i(unit_of_lane);
  Codec codecs[kW];
  OperandRange range = codecs[0].prepare(w, begin);
  for (int j = 1; j < kW; ++j) codecs[j] = codecs[0];
  for (int64_t r = begin; r < end; r += kW) {
    F sum[kW][kX];
    const uint8_t* rows[kW];
    for (int j = 0; j < kW; ++j) {
      const int64_t row = r + j < end ? r + j : r;
      rows[j] = w.codes + row * w.row_bytes;
      if (has_own_levels(w)) range = codecs[j].prepare(w, row);
      for (int i = 0; i < kX; ++i) sum[j][i] = zero();
      // Sixteen units of each product, then the next sixteen.
      for_each_unit<Codec::kBits, kShifted>(
          w, row, x.unit, units, range, [&](int64_t u, F factors, F shifts) {
            for (int i = 0; i < kX; ++i) {
              store(factor + u * kW * kX + (j * kX + i) * 16,
                    mul(factors, load(x.scale + i * units + u)));
              if constexpr (kShifted)
                sum[j][i] = sub(sum[j][i], mul(shifts, load(x.sum + i * units + u)));
            }
          });
    }
    const auto take = [&](const Stored* codes, int64_t b) {
      I products[kW][kX];
      block_products<Codec, kOperand, kX, kW>(
          codecs, codes, x.data + b * kX * kBlockBytes<Codec, kOperand>, products);
      const int64_t u = b * units_per_block;
      const float* of_block = factor + u / 16 * 16 * kW * kX + u % 16;
      for (int j = 0; j < kW; ++j) {
        for (int i = 0; i < kX; ++i) {
          const F factors = lookup(load(of_block + (j * kX + i) * 16), lanes);
          sum[j][i] = fma(to_float(products[j][i]), factors, sum[j][i]);
        }
      }
    };
    Stored codes[kW];
    int64_t b = 0;
    for (; b < whole; ++b) {
      for (int j = 0; j < kW; ++j) {
        ask_ahead<Codec>(w, rows[j], b, kW);
        codes[j] = load_stored<Codec>(w, rows[j], b);
      }
      take(codes, b);
    }
    if (b < blocks) {
      for (int j = 0; j < kW; ++j) codes[j] = load_stored_tail<Codec>(w, rows[j], b);
      take(codes, b);
    }
    for (int j = 0; j < kW && r + j < end; ++j)
      for (int i = 0; i < kX; ++i) y[i * ldy + r + j - begin] += reduce_add(sum[j][i]);
  }
}

template <class Codec, Operand kOperand>
static inline void multiply_rows_as(const PackedView& w, const Activations& x, int64_t begin,
                                    int64_t end, float* factor, float* y, int64_t ldy) {
  const bool shifted = has_shift<Codec::kBits>(w, Codec().prepare(w, begin).offset);
  const auto multiply = [&](auto rows) {
    constexpr int kX = decltype(rows)::value;
    (shifted ? multiply_rows_with<Codec, kOperand, true, kX>
             : multiply_rows_with<Codec, kOperand, false, kX>)(w, x, begin, end, factor, y, ldy);
  };
  if (x.rows == 1) return multiply(Count<1>());
  if constexpr (kWalkedRows > 1 && kOperand != Operand::kTwoBytes) {
    if (x.rows == 2) return multiply(Count<2>());
    if (x.rows == 3) return multiply(Count<3>());
    multiply(Count<4>());
  }
}
