// Products of a few activations with rows of a weight, one row after another, each read as one
// stream. Included by each target.

// Rows of activations that one pass over a row of weights serves.
constexpr int kMostRows = 4;

// Lane to unit: which of a block's factors belongs to each of sixteen lanes.
static inline I units_of_lanes(int64_t cols_per_lane, int64_t unit) {
  int32_t at[16];
  for (int64_t i = 0; i < 16; ++i) at[i] = static_cast<int32_t>(i * cols_per_lane / unit);
  return load_i(at);
}

// The integer products of sixteen lanes with row `m` of activations, and of those that lie
// `Codec::kParts` vectors further.
template <class Codec, Operand kOperand>
static inline I dot_block(const I* parts, const uint8_t* x) {
  if constexpr (kOperand == Operand::kWords) {
    I sum = zero_i();
    for (int p = 0; p < Codec::kParts; ++p) sum = dot_words(sum, parts[p], load_i(x + 64 * p));
    return sum;
  } else if constexpr (kOperand == Operand::kBytes) {
    I sum = zero_i();
    for (int p = 0; p < Codec::kParts; ++p)
      sum = dot_bytes<Codec::kSmall>(sum, parts[p], load_i(x + 64 * p));
    return sum;
  } else {
    I high = zero_i(), low = zero_i();
    for (int p = 0; p < Codec::kParts; ++p) {
      high = dot_bytes<Codec::kSmall>(high, parts[p], load_i(x + 128 * p));
      low = dot_bytes<Codec::kSmall>(low, parts[p], load_i(x + 128 * p + 64));
    }
    return add_i(shift_left_i(high, 8), low);
  }
}

// y[i, r - begin] += for rows [m0, m0 + M) of x and [begin, end) of w.
template <class Codec, Operand kOperand, int M>
static inline void multiply_rows_by(const PackedView& w, const Activations& x, int64_t m0,
                                    int64_t begin, int64_t end, float* scratch, float* y,
                                    int64_t ldy) {
  constexpr int kBits = Codec::kBits;
  float* shift = scratch;
  float* factor = scratch + x.units + 16;
  const int64_t units_per_block = x.layout->block_cols / x.unit;
  const I lanes = units_of_lanes(kColsPerLane<kBits>, x.unit);
  const int64_t stride = x.rows * x.layout->block_bytes;
  const uint8_t* data = x.data + m0 * x.layout->block_bytes;
  const int64_t whole = whole_blocks<Codec>(w);
  const bool own_table = w.family == Family::kLearnedCodebook && w.scale_row_stride != 0;
  Codec codec;
  OperandRange range = codec.prepare(w, begin);
  for (int64_t r = begin; r < end; ++r) {
    if (own_table && r > begin) range = codec.prepare(w, r);
    const bool shifted = load_units<kBits>(w, r, x.unit, x.units, range, factor, shift);
    F sums[M];
    for (int i = M - 1; i >= 0; --i) {  // the first row's factors replace the weight's own, last
      const float* scale = x.scale + (m0 + i) * x.units;
      const float* sum = x.sum + (m0 + i) * x.units;
      float* to = factor + i * (x.units + 16);
      sums[i] = zero();
      for (int64_t u = 0; u < x.units; u += 16) {
        if (shifted) sums[i] = sub(sums[i], mul(load(shift + u), load(sum + u)));
        store(to + u, mul(load(factor + u), load(scale + u)));
      }
    }
    const uint8_t* row = w.codes + r * w.row_bytes;
    const auto take = [&](const Stored& codes, int64_t b) {
      I parts[Codec::kParts];
      codec.expand(codes, parts);
      for (int i = 0; i < M; ++i) {
        const I products =
            dot_block<Codec, kOperand>(parts, data + b * stride + i * x.layout->block_bytes);
        const F factors =
            lookup(load(factor + i * (x.units + 16) + b * units_per_block), lanes);
        sums[i] = fma(to_float(products), factors, sums[i]);
      }
    };
    int64_t b = 0;
    for (; b < whole; ++b) take(load_stored<Codec>(w, row, b), b);
    if (b < x.blocks) take(load_stored_tail<Codec>(w, row, b), b);
    for (int i = 0; i < M; ++i) y[(m0 + i) * ldy + r - begin] += reduce_add(sums[i]);
  }
}

template <class Codec, Operand kOperand>
static void multiply_rows_with(const PackedView& w, const Activations& x, int64_t begin,
                               int64_t end, float* scratch, float* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + 4 <= x.rows; m += 4)
    multiply_rows_by<Codec, kOperand, 4>(w, x, m, begin, end, scratch, y, ldy);
  switch (x.rows - m) {
    case 3:
      return multiply_rows_by<Codec, kOperand, 3>(w, x, m, begin, end, scratch, y, ldy);
    case 2:
      return multiply_rows_by<Codec, kOperand, 2>(w, x, m, begin, end, scratch, y, ldy);
    case 1:
      return multiply_rows_by<Codec, kOperand, 1>(w, x, m, begin, end, scratch, y, ldy);
    default:
      return;
  }
}
