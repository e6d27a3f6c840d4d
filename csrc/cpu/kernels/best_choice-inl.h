// The best of many choices of scale and zero point, for sixteen spans, without working out every
// error: 16-bit fixed-point arithmetic, twice as many weights to a vector and half the
// instructions, says within which bounds each error lies, and only choices that may be the best are
// tried as the kernel `errors` does. What comes out is what trying all of them would give. Included
// by each target, after search-inl.h.
//
// In units u = scale / 1024, a weight w is off its nearest code by r. Fixed point has
//   x = round(w * 32767 / absmax),  f = round(1024 / scale * absmax / 32767 * 2^15) <= 32767,
//   t = round(x * f / 2^15),        each of which moves t from w / u by at most half a unit,
// so its r is within 1.5 of the true one (a distance to the grid changes no faster than t), and the
// root of the sum of r^2 over n weights within d = 1.5 sqrt(n). For any 0 < b < 1 then
//   (1 - b) E - (1 / b - 1) d^2  <=  (sqrt(E) -+ d)^2  <=  (1 + b) E + (1 + 1 / b) d^2.

constexpr float kUnits = 1024.0f;               // of fixed point, to a step of the grid
constexpr float kLargestWord = 32767.0f;        // words are within -+ this
constexpr float kSquaredUnits = 1.55f * 1.55f;  // d^2 of a weight, with room for float arithmetic
// A step of pairs, whose squares add up to less than 2^31 as long as no weight is further off than
// this many steps of the grid.
constexpr int64_t kPairsAtOnce = 8;
constexpr float kFarthestOff = 11.25f;

// 16-bit grids have too little room for steps of 8-bit codes, and real zero points may be far out.
static inline bool has_bounds(const Encoding& encoding, int64_t n) {
  return !encoding.book && encoding.bits < 8 && encoding.zero != Zero::kFloat && n % 2 == 0;
}

// Sums of r^2 for Count choices, in fixed point.
template <int Count>
static inline void fixed_point_errors(int bits, const int16_t* words, int64_t pairs,
                                      const I* factor, const I* shift, F* errors) {
  I by[Count], moved[Count];
  F total[Count];
  for (int c = 0; c < Count; ++c) {
    by[c] = factor[c];
    moved[c] = shift[c];
    total[c] = zero();
  }
  const I bottom = zero_i(), top = set1_16(((1 << bits) - 1) * 1024);
  const I code = set1_16(-1024), half = set1_16(512);  // t + half a step, less what is below a step
  for (int64_t first = 0; first < pairs; first += kPairsAtOnce) {
    const int64_t last = first + kPairsAtOnce < pairs ? first + kPairsAtOnce : pairs;
    I sum[Count];
    for (int c = 0; c < Count; ++c) sum[c] = bottom;
    for (int64_t j = first; j < last; ++j) {
      const I x = load_i(words + 32 * j);
      for (int c = 0; c < Count; ++c) {
        const I t = add_16(scale_16(x, by[c]), moved[c]);
        const I off = sub_16(t, select_bits(code, min_16(max_16(t, bottom), top), half));
        sum[c] = dot_words(sum[c], off, off);
      }
    }
    for (int c = 0; c < Count; ++c) total[c] = add(total[c], to_float(sum[c]));
  }
  for (int c = 0; c < Count; ++c) errors[c] = total[c];
}

// All choices are tried of spans that are not usable: whose squares may not be proper floats.
struct FixedPoint {
  F absmax, low, high, to_words;
  F usable;  // 1 or 0 by lane
};

static inline FixedPoint fixed_point_of(F low, F high) {
  const F absmax = max(abs(low), abs(high)), one = set1(1.0f), none = zero();
  F usable = select_above(absmax, set1(1e-12f), one, none);
  usable = select_above(absmax, set1(1e12f), none, usable);
  const F to_words = div(set1(kLargestWord), max(absmax, set1(1e-12f)));
  return {absmax, low, high, mul(to_words, usable), usable};
}

// The factor f and the shift of t (to code 0, and half a step on) of a choice; returns 0 by lane
// where a word could not hold t, else 1.
static inline F fixed_point_choice(const FixedPoint& p, F top, F scale, F zero_point, I* factor,
                                   I* shift) {
  const F one = set1(1.0f), none = zero();
  const F inverse = div(one, max(scale, set1(1e-38f)));
  const F f = mul(mul(inverse, p.absmax), set1(kUnits * 32768.0f / kLargestWord));
  const F farthest = set1(kFarthestOff);
  const F most = add(mul(p.high, inverse), zero_point),
          least = add(mul(p.low, inverse), zero_point);
  F fits = select_above(f, set1(kLargestWord - 1.0f), none, p.usable);
  fits = select_above(sub(most, top), farthest, none, fits);
  fits = select_above(negative(least), farthest, none, fits);
  fits = select_above(most, set1(31.0f), none, fits);
  const F steps = add(mul(zero_point, set1(kUnits)), set1(kUnits / 2));
  // Nothing that a word cannot hold may become one.
  const F by = select_above(fits, none, f, none), moved = select_above(fits, none, steps, none);
  *factor = pair_words(by, by);
  *shift = pair_words(moved, moved);
  return fits;
}

// Per lane a list of the choices whose bit is set, in their order; returns how many the longest
// has, at least 1. Shorter ones repeat their last.
static inline int64_t list_candidates(int* lanes, int64_t count, const float* scale,
                                      const float* zero_point, float* scales, float* zeros) {
  F s = load(scale), z = load(zero_point);  // where there is none
  int64_t most = 0;
  int left;
  do {
    int taken = 0;
    left = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int now = lanes[c] & ~taken;
      s = select_lanes(now, load(scale + 16 * c), s);
      z = select_lanes(now, load(zero_point + 16 * c), z);
      taken |= now;
      lanes[c] &= ~now;
      left |= lanes[c];
    }
    store(scales + 16 * most, s);
    store(zeros + 16 * most, z);
    ++most;
  } while (left);
  return most;
}

// The choices that may be the best, by lane, into `scales` and `zeros`; returns how many.
static int64_t candidates(const Encoding& encoding, const float* block, int64_t n, const float* low,
                          const float* high, int64_t count, const float* scale,
                          const float* zero_point, int16_t* words, float* scales, float* zeros) {
  const FixedPoint p = fixed_point_of(load(low), load(high));
  const int64_t pairs = n / 2;
  for (int64_t j = 0; j < pairs; ++j) {
    const float* at = block + 32 * j;
    store_i(words + 32 * j, pair_words(mul(load(at), p.to_words), mul(load(at + 16), p.to_words)));
  }
  I factor[kMaxChoices], shift[kMaxChoices];
  F fits[kMaxChoices], error[kMaxChoices];
  const F top = set1(static_cast<float>((1 << encoding.bits) - 1));
  for (int64_t c = 0; c < count; ++c)
    fits[c] = fixed_point_choice(p, top, load(scale + 16 * c), load(zero_point + 16 * c),
                                 &factor[c], &shift[c]);
  int64_t c = 0;
  for (; count % 5 == 0 && c < count; c += 5)
    fixed_point_errors<5>(encoding.bits, words, pairs, factor + c, shift + c, error + c);
  for (; c + 4 <= count; c += 4)
    fixed_point_errors<4>(encoding.bits, words, pairs, factor + c, shift + c, error + c);
  for (; c < count; ++c)
    fixed_point_errors<1>(encoding.bits, words, pairs, factor + c, shift + c, error + c);

  const F one = set1(1.0f), none = zero(), never = set1(__builtin_inff());
  const F d2 = set1(kSquaredUnits * static_cast<float>(n));
  // Room for the rounding of sums, here and in `errors`.
  const F room = set1(static_cast<float>(n + 256) * 0x1p-24f);
  F least = never, off = d2;
  for (c = 0; c < count; ++c) {
    const F s = load(scale + 16 * c);
    const F squared = select_above(fits[c], none, mul(mul(s, s), error[c]), never);
    off = select_above(least, squared, error[c], off);
    least = min(squared, least);
  }
  // b where the bounds of the best are the closest.
  const F b = min(sqrt(div(d2, max(off, d2))), set1(0.5f));
  const F above = mul(d2, add(one, div(one, b))), below = mul(d2, sub(div(one, b), one));
  const F more = add(one, b), less = sub(one, b);
  F bound = never;  // the best is not above it
  for (c = 0; c < count; ++c) {
    const F s = load(scale + 16 * c), most = mul(mul(s, s), add(mul(error[c], more), above));
    bound = select_above(fits[c], none, min(most, bound), bound);
  }
  bound = mul(bound, add(one, room));
  int lanes[kMaxChoices];
  for (c = 0; c < count; ++c) {
    const F s = load(scale + 16 * c);
    const F least_c = mul(mul(mul(s, s), sub(mul(error[c], less), below)), sub(one, room));
    const int no_choice = 0xffff & ~lanes_above(s, none);
    lanes[c] = 0xffff & ~no_choice & ~(lanes_above(fits[c], none) & lanes_above(least_c, bound));
  }
  return list_candidates(lanes, count, scale, zero_point, scales, zeros);
}

static void best_choice(const Encoding& encoding, const float* block, int64_t n, const float* low,
                        const float* high, int64_t count, const float* scale,
                        const float* zero_point, int16_t* scratch, float* best_scale,
                        float* best_zero, float* least) {
  float scales[kMaxChoices * 16], zeros[kMaxChoices * 16], each[kMaxChoices * 16];
  if (has_bounds(encoding, n)) {
    count =
        candidates(encoding, block, n, low, high, count, scale, zero_point, scratch, scales, zeros);
    scale = scales;
    zero_point = zeros;
  }
  errors(encoding, block, n, count, scale, zero_point, each);
  F s = load(scale), z = load(zero_point), e = load(each);
  for (int64_t c = 1; c < count; ++c) {
    const F other = load(each + 16 * c);
    s = select_above(e, other, load(scale + 16 * c), s);
    z = select_above(e, other, load(zero_point + 16 * c), z);
    e = select_above(e, other, other, e);
  }
  store(best_scale, s);
  store(best_zero, z);
  store(least, e);
}
