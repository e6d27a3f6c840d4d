// Integer sums across groups, whose scales differ. A span of several units gets one step, of which
// the largest weight has some 13 bits, and each operand is multiplied beforehand by what its unit's
// scale is in such steps, and moved by its zero point:
//   factor * operand + shift = step * (share * operand + offset).
// Included by each target.

// Just below kLevelLimit, so that a share of one fits into a word.
constexpr float kShareLimit = kLevelLimit - 4;
// Weights with a step below this become zeros: what divides by it would overflow.
constexpr float kLeastStep = 1e-38f;

// By so many bits operands are shifted first: codes, less the middle of their grid, have but a few.
template <int Bits>
static inline int share_bits(const PackedView& w) {
  return w.family == Family::kInteger ? 14 - Bits : 0;
}

// Of kTileWidth rows, [units][kTileWidth] all: `factor` becomes the step of each span, at its first
// unit; `share` and `offset` two equal words a row. `shift`: null for none.
template <int Bits>
static void share_scales(const PackedView& w, const Activations& x, const float* shift,
                         float* factor, float* share, float* offset) {
  const int up = share_bits<Bits>(w);
  const F largest = set1(up ? static_cast<float>(1 << (Bits - 1)) : float{kLevelLimit});
  const F to_words = set1(32768.0f / static_cast<float>(1 << up));  // scale_16 divides by 2^15
  const int64_t per_span = x.span / x.unit;
  for (int64_t u = 0; u < x.units; u += per_span) {
    for (int64_t j = 0; j < kTileWidth; j += 16) {
      const int64_t first = u * kTileWidth + j, end = first + per_span * kTileWidth;
      const auto shift_at = [&](int64_t at) { return shift ? load(shift + at) : zero(); };
      F most = zero(), scale = zero(), nothing = zero();
      for (int64_t at = first; at < end; at += kTileWidth) {
        const F of_unit = abs(load(factor + at)), size = fma(of_unit, largest, abs(shift_at(at)));
        most = max(most, size);
        scale = max(scale, of_unit);
        nothing = fma(size, zero(), nothing);
      }
      // Whole steps to the largest scale, if there are any: codes under it, in a row with one scale
      // all of them, then lose nothing.
      const F limit = set1(kShareLimit), half = set1(0.5f);
      const F whole = round_even(sub(div(mul(limit, scale), most), half));
      const F steps = select_above(whole, half, div(scale, whole), div(most, limit));
      const F step = add(steps, nothing);  // NaN where a scale is that, or infinite
      const F inverse = div(set1(1.0f), step);
      const auto words = [&](F value) {
        value = select_above(step, set1(kLeastStep), value, zero());
        return pair_words(value, value);
      };
      for (int64_t at = first; at < end; at += kTileWidth) {
        store_i(share + at, words(mul(mul(load(factor + at), inverse), to_words)));
        store_i(offset + at, words(mul(shift_at(at), inverse)));
      }
      store(factor + first, step);
    }
  }
}
