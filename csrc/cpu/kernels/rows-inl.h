// Products of a few activations with rows of a weight, one row after another, each read as one
// stream. Included by each target.

// Lane to unit: which of a block's factors belongs to each of sixteen lanes.
static inline I units_of_lanes(int64_t cols_per_lane, int64_t unit) {
  int32_t at[16];
  for (int64_t i = 0; i < 16; ++i) at[i] = static_cast<int32_t>(i * cols_per_lane / unit);
  return load_i(at);
}

// The integer products of a block of a row with M rows of activations that lie `stride` bytes apart.
template <class Codec, Operand kOperand, int M>
static inline void dot_block(const Codec& codec, const Stored& codes, const uint8_t* x,
                             int64_t stride, I* sums) {
  I low[M];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) sums[i] = low[i] = zero_i();
#pragma GCC unroll 8
  for (int p = 0; p < Codec::kParts; ++p) {
    const I w = codec.part(codes, p);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const uint8_t* at = x + i * stride;
      if constexpr (kOperand == Operand::kWords) {
        sums[i] = dot_words(sums[i], w, load_i(at + 64 * p));
      } else if constexpr (kOperand == Operand::kBytes) {
        sums[i] = dot_bytes<Codec::kSmall>(sums[i], w, load_i(at + 64 * p));
      } else {
        sums[i] = dot_bytes<Codec::kSmall>(sums[i], w, load_i(at + 128 * p));
        low[i] = dot_bytes<Codec::kSmall>(low[i], w, load_i(at + 128 * p + 64));
      }
    }
  }
  if constexpr (kOperand == Operand::kTwoBytes) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) sums[i] = add_i(shift_left_i(sums[i], 8), low[i]);
  }
}

// y[i, r - begin] += for rows [m0, m0 + M) of x and [begin, end) of w. `factor`: M * (units + 16).
template <class Codec, Operand kOperand, int M, bool kShifted>
static void multiply_rows_by(const PackedView& w, const Activations& x, Codec codec,
                             OperandRange range, int64_t m0, int64_t begin, int64_t end,
                             float* factor, float* y, int64_t ldy) {
  const int64_t units = x.units, padded = units + 16;
  const int64_t units_per_block = x.layout->block_cols / x.unit;
  const int64_t row_bytes = x.layout->block_bytes, block_stride = x.rows * row_bytes;
  const I lanes = units_of_lanes(kColsPerLane<Codec::kBits>, x.unit);
  const uint8_t* data = x.data + m0 * row_bytes;
  const float* scale = x.scale + m0 * units;
  const float* sum = x.sum + m0 * units;
  const int64_t whole = whole_blocks<Codec>(w), blocks = x.blocks;
  const bool own_table = w.family == Family::kLearnedCodebook && w.scale_row_stride != 0;
  for (int64_t r = begin; r < end; ++r) {
    if (own_table) range = codec.prepare(w, r);
    F sums[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) sums[i] = zero();
    for_each_unit<Codec::kBits, kShifted>(
        w, r, x.unit, units, range, [&](int64_t u, F factors, F shifts) {
#pragma GCC unroll 4
          for (int i = 0; i < M; ++i) {
            store(factor + i * padded + u, mul(factors, load(scale + i * units + u)));
            if constexpr (kShifted) {
              sums[i] = sub(sums[i], mul(shifts, load(sum + i * units + u)));
            }
          }
        });
    const uint8_t* row = w.codes + r * w.row_bytes;
    const auto take = [&](const Stored& codes, int64_t b) {
      I products[M];
      dot_block<Codec, kOperand, M>(codec, codes, data + b * block_stride, row_bytes, products);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        const F factors = lookup(load(factor + i * padded + b * units_per_block), lanes);
        sums[i] = fma(to_float(products[i]), factors, sums[i]);
      }
    };
    int64_t b = 0;
    for (; b < whole; ++b) take(load_stored<Codec>(w, row, b), b);
    if (b < blocks) take(load_stored_tail<Codec>(w, row, b), b);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) y[(m0 + i) * ldy + r - begin] += reduce_add(sums[i]);
  }
}

template <class Codec, Operand kOperand>
static void multiply_rows_with(const PackedView& w, const Activations& x, int64_t begin,
                               int64_t end, float* factor, float* y, int64_t ldy) {
  Codec codec;
  const OperandRange range = codec.prepare(w, begin);
  const bool shifted = has_shift<Codec::kBits>(w, range.offset);
  const auto pass = [&](auto rows, int64_t m) {
    constexpr int kRows = decltype(rows)::value;
    if (shifted) {
      multiply_rows_by<Codec, kOperand, kRows, true>(w, x, codec, range, m, begin, end, factor, y,
                                                     ldy);
    } else {
      multiply_rows_by<Codec, kOperand, kRows, false>(w, x, codec, range, m, begin, end, factor,
                                                      y, ldy);
    }
  };
  int64_t m = 0;
  for (; m + 4 <= x.rows; m += 4) pass(Count<4>(), m);
  if (x.rows - m == 3) pass(Count<3>(), m);
  if (x.rows - m == 2) pass(Count<2>(), m);
  if (x.rows - m == 1) pass(Count<1>(), m);
}
