// Integer sums across groups, whose scales differ. A span of several units gets one step, of which
// the largest weight has some 13 bits, and each operand is multiplied beforehand by what its unit's
// scale is in such steps, and moved by its zero point:
//   factor * operand + shift = step * (share * operand + offset).
// Included by each target.

// Steps of the largest weight: below kLevelLimit, since operand, share and offset are rounded.
constexpr float kShareLimit = kLevelLimit - 4;
// Units go each with its own scale where one has less than this part of the largest of their span,
// and would keep too few steps,
constexpr float kLeastShare = 1.0f / 8;
// and where weights are too near the ends of what a float can hold, infinite or NaN.
constexpr float kLeastStep = 1e-30f, kMostShared = 1e30f;

// By so many bits operands are shifted first: codes, less the middle of their grid, have but a few.
template <int Bits>
static inline int share_bits(const PackedView& w) {
  return w.family == Family::kInteger ? 14 - Bits : 0;
}

// What a span of sixteen rows becomes, from its units' factors and shifts (null for none), which
// lie kTileWidth floats apart: `share` and `offset` of each unit, two equal words a row, and at the
// first unit `step`. False where units must go each with its own.
template <int Bits>
static bool share_span(const PackedView& w, int64_t units, const float* factor, const float* shift,
                       float* share, float* offset, float* step) {
  const int up = share_bits<Bits>(w);
  const F largest = set1(up ? static_cast<float>(1 << (Bits - 1)) : float{kLevelLimit});
  const int64_t end = units * kTileWidth;
  const auto shift_at = [&](int64_t at) { return shift ? load(shift + at) : zero(); };
  F most = zero(), total = zero(), scale = zero(), least = set1(kMostShared);
  for (int64_t at = 0; at < end; at += kTileWidth) {
    const F of_unit = abs(load(factor + at)), size = fma(of_unit, largest, abs(shift_at(at)));
    most = max(most, size);
    total = add(total, size);
    scale = max(scale, of_unit);
    least = min(least, select_above(of_unit, zero(), of_unit, set1(kMostShared)));  // zeros do fit
  }
  // Whole steps to the largest scale, if they are many: codes under it, in a row with one scale all
  // of them, then lose nothing.
  const F limit = set1(kShareLimit);
  const F whole = round_even(sub(mul(limit, div(scale, most)), set1(0.5f)));
  const F of_step = select_above(whole, set1(16.0f), div(scale, whole), div(most, limit));
  const int all = 0xffff, not_zero = lanes_above(scale, zero());
  if (lanes_above(set1(kMostShared), total) != all) return false;  // or NaN
  if (lanes_above(mul(scale, set1(kLeastShare)), least) & not_zero) return false;
  if (lanes_above(set1(kLeastStep), of_step) & not_zero) return false;
  const F inverse = div(set1(1.0f), of_step);
  const F to_words = set1(32768.0f / static_cast<float>(1 << up));  // scale_16 divides by 2^15
  const auto words = [&](F value) {
    value = select_above(of_step, zero(), value, zero());
    return pair_words(value, value);
  };
  for (int64_t at = 0; at < end; at += kTileWidth) {
    store_i(share + at, words(mul(mul(load(factor + at), inverse), to_words)));
    store_i(offset + at, words(mul(shift_at(at), inverse)));
  }
  store(step, of_step);
  return true;
}

// Whether a span has one scale: not where several of sixteen rows from all over the weight have
// groups in it whose scales are that far apart. A method that evens out activations leaves all rows
// so, and activations large where weights are small: these want scales of their own too.
template <int Bits>
static void mark_spans_of(const PackedView& w, const Activations& x) {
  constexpr int64_t kSampled = 16;
  const int64_t per_span = x.span / x.unit;
  memset(x.shared, 0, static_cast<size_t>(x.units));  // how many rows have such groups
  float *factors = x.sum, *decoded = x.sum + unit_floats(x, 1);
  const OperandRange range{1.0f, 0.0f};
  for (int64_t i = 0; w.groups > 1 && i < kSampled; ++i) {
    load_units<Bits>(w, i * w.rows / kSampled, 1, x.unit, x.units, &range, decoded, factors,
                     nullptr);
    for (int64_t u = 0; u < x.units; u += per_span) {
      float most = 0.0f, least = kMostShared;
      for (int64_t at = u; at < u + per_span; ++at) {
        const float scale = factors[at] < 0.0f ? -factors[at] : factors[at];
        if (scale > most) most = scale;
        if (scale > 0.0f && scale < least) least = scale;
      }
      x.shared[u] = static_cast<uint8_t>(x.shared[u] + (least < kLeastShare * most));
    }
  }
  for (int64_t u = 0; u < x.units; u += per_span) x.shared[u] = x.shared[u] <= 1;
}
