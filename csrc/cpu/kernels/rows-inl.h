// The product of one row of activations with rows of a weight, one after another: a stream of
// memory. Included by each target.

// The integer products of a block of a row; x as its layout has it.
template <class Codec, Operand kOperand>
static inline I block_products(const Codec& codec, const Stored& codes, const uint8_t* x) {
  I sum = zero_i(), low = zero_i();
#pragma GCC unroll 8
  for (int p = 0; p < Codec::kParts; ++p) {
    const I w = codec.part(codes, p);
    if constexpr (kOperand == Operand::kWords) {
      sum = dot_words(sum, w, load_i(x + 64 * p));
    } else if constexpr (kOperand == Operand::kBytes) {
      sum = dot_bytes<Codec::kSmall>(sum, w, load_i(x + 64 * p));
    } else {
      sum = dot_bytes<Codec::kSmall>(sum, w, load_i(x + 128 * p));
      low = dot_bytes<Codec::kSmall>(low, w, load_i(x + 128 * p + 64));
    }
  }
  return kOperand == Operand::kTwoBytes ? add_i(shift_left_i(sum, 8), low) : sum;
}

// The CPU follows a stream by itself, but not over the end of a page, nor two streams in turn (the
// planes of 3-bit codes). A page ahead is time enough for the page table to be walked.
template <class Codec>
[[gnu::always_inline]] static inline void ask_ahead(const PackedView& w, const uint8_t* row,
                                                    int64_t block) {
  constexpr int64_t kPage = 4096;
  prefetch_far(row + 64 * block + kPage);
  if (Codec::kBits == 3 && block % 2 == 0) prefetch_far(row + w.plane_bytes + 32 * block + kPage);
}

// y[r - begin] += for the rows [begin, end) of w. `factor`: units + 16 floats.
template <class Codec, Operand kOperand, bool kShifted>
static void multiply_rows_with(const PackedView& w, const Activations& x, Codec codec,
                               OperandRange range, int64_t begin, int64_t end, float* factor,
                               float* y) {
  const int64_t units = x.units, units_per_block = x.layout->block_cols / x.unit;
  const int64_t block_bytes = x.layout->block_bytes;
  const int64_t whole = whole_blocks<Codec>(w), blocks = x.blocks;
  int32_t unit_of_lane[16];
  for (int64_t i = 0; i < 16; ++i)
    unit_of_lane[i] = static_cast<int32_t>(i * kColsPerLane<Codec::kBits> / x.unit);
  const I lanes = load_i(unit_of_lane);
  for (int64_t r = begin; r < end; ++r) {
    if (has_own_levels(w)) range = codec.prepare(w, r);
    F sum = zero();
    for_each_unit<Codec::kBits, kShifted>(w, r, x.unit, units, range,
                                          [&](int64_t u, F factors, F shifts) {
                                            store(factor + u, mul(factors, load(x.scale + u)));
                                            if constexpr (kShifted)
                                              sum = sub(sum, mul(shifts, load(x.sum + u)));
                                          });
    const uint8_t* row = w.codes + r * w.row_bytes;
    const auto take = [&](const Stored& codes, int64_t b) {
      const I products = block_products<Codec, kOperand>(codec, codes, x.data + b * block_bytes);
      sum = fma(to_float(products), lookup(load(factor + b * units_per_block), lanes), sum);
    };
    int64_t b = 0;
    for (; b < whole; ++b) {
      ask_ahead<Codec>(w, row, b);
      take(load_stored<Codec>(w, row, b), b);
    }
    if (b < blocks) take(load_stored_tail<Codec>(w, row, b), b);
    y[r - begin] += reduce_add(sum);
  }
}

template <class Codec, Operand kOperand>
static inline void multiply_rows_as(const PackedView& w, const Activations& x, int64_t begin,
                                    int64_t end, float* factor, float* y) {
  Codec codec;
  const OperandRange range = codec.prepare(w, begin);
  (has_shift<Codec::kBits>(w, range.offset)
       ? multiply_rows_with<Codec, kOperand, true>
       : multiply_rows_with<Codec, kOperand, false>)(w, x, codec, range, begin, end, factor, y);
}
