// From floats to packed codes: extremes of each span, the scale of a range, codes for a scale.
// Included by each target.

static bool stats(const float* w, int64_t n, int64_t group, float* low, float* high) {
  F poison = zero();
  const F nothing = zero();
  int64_t at = 0;
  for (int64_t g = 0; at < n; ++g) {
    const int64_t end = at + group < n ? at + group : n;
    F least = set1(w[at]), most = least;
    const auto take = [&](F v) {
      least = min(v, least);
      most = max(v, most);
      poison = fma(v, nothing, poison);  // NaN and infinity times zero are NaN, and stay
    };
    for (; at + 16 <= end; at += 16) take(load(w + at));
    if (at < end) {
      float lane[16];
      for (int64_t j = 0; j < 16; ++j) lane[j] = w[at + j < end ? at + j : at];
      take(load(lane));
      at = end;
    }
    low[g] = reduce_min(least);
    high[g] = reduce_max(most);
  }
  return reduce_add(poison) == 0.0f;
}

constexpr float kLargestFloat = 3.402823466e38f;

static inline F negative(F v) { return mul(v, set1(-1.0f)); }

// A range [low, high] as scale and zero point, lane by lane.
static inline void grid_of_range(const Encoding& encoding, F low, F high, F* scale, F* zero_point) {
  const F top = set1(static_cast<float>((1 << encoding.bits) - 1)), none = zero();
  F step = div(sub(high, low), top);
  // The range of +-3e38 is no float.
  step = select_above(step, set1(kLargestFloat), sub(div(high, top), div(low, top)), step);
  if (encoding.zero == Zero::kInt) {
    const F code = min(max(round_even(div(negative(low), step)), none), top);
    *scale = select_above(step, none, step, none);
    *zero_point = select_above(step, none, code, none);
    return;
  }
  // Real zero point: keep it below 2048, where fp16 still resolves whole codes, by not letting the
  // step get too fine.
  const F magnitude = max(abs(low), abs(high));
  *scale = max(step, mul(magnitude, set1(1.0f / 1024)));
  *zero_point = select_above(*scale, none, div(negative(low), *scale), none);
}

static inline void choose(const Encoding& encoding, F low, F high, F shrink_low, F shrink_high,
                          F* scale, F* zero_point) {
  const F absmax = max(abs(low), abs(high));
  const float half = static_cast<float>(1 << (encoding.bits - 1));
  *zero_point = zero();
  if (encoding.book) {
    *scale = mul(absmax, shrink_high);
  } else if (encoding.zero == Zero::kNone || encoding.zero == Zero::kMidrise) {
    const float reach = encoding.zero == Zero::kNone ? half - 1.0f : half - 0.5f;
    *scale = div(mul(absmax, shrink_high), set1(reach));
    *zero_point = set1(encoding.zero == Zero::kNone ? half : half - 0.5f);
  } else if (encoding.zero == Zero::kInt) {
    // The zero point is a code, so the range must hold zero.
    grid_of_range(encoding, mul(min(low, zero()), shrink_low), mul(max(high, zero()), shrink_high),
                  scale, zero_point);
  } else {
    const F middle = add(mul(low, set1(0.5f)), mul(high, set1(0.5f)));
    grid_of_range(encoding, add(middle, mul(sub(low, middle), shrink_low)),
                  add(middle, mul(sub(high, middle), shrink_high)), scale, zero_point);
  }
}

static void choices(const Encoding& encoding, int64_t n, const float* low, const float* high,
                    const float* shrink_low, const float* shrink_high, float* scale,
                    float* zero_point) {
  for (int64_t i = 0; i < n; i += 16) {
    const int count = static_cast<int>(n - i < 16 ? n - i : 16);
    const auto part = [&](const float* p) {
      return count == 16 ? load(p + i) : load_part(p + i, count);
    };
    F s, z;
    choose(encoding, part(low), part(high), part(shrink_low), part(shrink_high), &s, &z);
    store_part(scale + i, s, count);
    store_part(zero_point + i, z, count);
  }
}

// inverse_of (core/scale_coding.h), by lanes.
static inline F inverses_of(F scale) {
  const F tiny = set1(1e-38f);
  return div(set1(1.0f), select_above(zero(), scale, min(negative(tiny), scale), max(tiny, scale)));
}

// Integer grid: clamp(round(w / scale + zero), 0, top), still as floats.
template <int Bits>
struct GridEncoder {
  static constexpr int kBits = Bits;
  F inverse, zero_point, top;
  GridEncoder() = default;
  explicit GridEncoder(const Encoding& /*encoding*/)
      : inverse(zero()), zero_point(zero()), top(set1(static_cast<float>((1 << Bits) - 1))) {}
  void use(F inverse_scale, F zero_point_of_span) {
    inverse = inverse_scale;
    zero_point = zero_point_of_span;
  }
  F level(F w) const { return clamp_code(round_even(add(mul(w, inverse), zero_point)), top); }
  F unit(F w) const { return sub(level(w), zero_point); }
  I code(F w) const { return to_int(level(w)); }
};

// Codebook: binary search for the level of w / scale (core/codebook.h).
template <int Bits>
struct CodebookEncoder {
  static constexpr int kBits = Bits;
  F inverse, pivots[Bits], levels;
  I codes;
  CodebookEncoder() = default;
  explicit CodebookEncoder(const Encoding& encoding)
      : inverse(zero()),
        levels(load(encoding.book->level_of_path)),
        codes(load_i(encoding.book->code_of_path)) {
    pivots[0] = set1(encoding.book->pivot_of_path[0][0]);
    for (int k = 1; k < Bits; ++k) pivots[k] = load(encoding.book->pivot_of_path[k]);
  }
  void use(F inverse_scale, F /*zero_point*/) { inverse = inverse_scale; }
  I path(F w) const {
    const F scaled = mul(w, inverse);
    I at = set_bit_above(zero_i(), scaled, pivots[0], 1);
    for (int k = 1; k < Bits; ++k) at = set_bit_above(at, scaled, lookup8(pivots[k], at), 1 << k);
    return at;
  }
  F unit(F w) const { return lookup(levels, path(w)); }
  I code(F w) const { return lookup_int(codes, path(w)); }
};

// job(encoder) with the encoder of a format, its bits known to the compiler.
template <class Job>
static inline void with_encoder(const Encoding& encoding, const Job& job) {
  const bool grid = !encoding.book;
  switch (encoding.bits) {
    case 8:
      return job(GridEncoder<8>(encoding));
    case 4:
      return grid ? job(GridEncoder<4>(encoding)) : job(CodebookEncoder<4>(encoding));
    case 3:
      return grid ? job(GridEncoder<3>(encoding)) : job(CodebookEncoder<3>(encoding));
    case 2:
      return grid ? job(GridEncoder<2>(encoding)) : job(CodebookEncoder<2>(encoding));
    default:
      return;
  }
}

// Sixteen codes to column `col` (a multiple of 16) of a packed row.
template <int Bits>
static inline void pack(I code, int64_t col, uint8_t* row, int64_t plane_bytes) {
  if constexpr (Bits == 8) pack8(row + col, code);
  if constexpr (Bits == 4) pack4(row + col / 2, code);
  if constexpr (Bits == 2) pack2(row + col / 4, code);
  if constexpr (Bits == 3) {
    pack2(row + col / 4, code);
    pack_bit2(row + plane_bytes + col / 8, code);
  }
}

// The first n codes; the bits after them are zero to the end of their byte.
template <int Bits>
static inline void pack_tail(I code, int n, int64_t col, uint8_t* row, int64_t plane_bytes) {
  uint8_t codes[16], packed[32];
  pack8(codes, code);
  for (int i = n; i < 16; ++i) codes[i] = 0;
  pack<Bits>(unpack8(codes), 0, packed, 16);
  const auto bytes = [&](int bits) { return static_cast<size_t>((n * bits + 7) / 8); };
  if constexpr (Bits == 3) {
    memcpy(row + col / 4, packed, bytes(2));
    memcpy(row + plane_bytes + col / 8, packed + 16, bytes(1));
  } else {
    memcpy(row + col * Bits / 8, packed, bytes(Bits));
  }
}

template <class Encoder>
static inline void encode_row(const float* w, int64_t n, int64_t group, const float* scale,
                              const float* zero_point, Encoder encoder, uint8_t* row) {
  constexpr int Bits = Encoder::kBits;
  const int64_t plane_bytes = Bits == 3 ? (n + 3) / 4 : 0;
  constexpr int64_t kAhead = 64;  // a call inside the loop over weights would empty its registers
  float inverse[kAhead];
  int64_t at = 0;
  for (int64_t g = 0; at < n; ++g) {
    if (g % kAhead == 0) {
      const int64_t left = (n - at + group - 1) / group, count = left < kAhead ? left : kAhead;
      for (int64_t i = 0; i < count; i += 16) {
        const int part = static_cast<int>(count - i < 16 ? count - i : 16);
        store(inverse + i, inverses_of(load_part(scale + g + i, part)));
      }
    }
    encoder.use(set1(inverse[g % kAhead]), set1(zero_point ? zero_point[g] : 0.0f));
    const int64_t end = at + group < n ? at + group : n;
    for (; at + 16 <= end; at += 16) {
      // The next row is on its way while this one, in cache since its statistics, is encoded.
      __builtin_prefetch(w + at + n);
      pack<Bits>(encoder.code(load(w + at)), at, row, plane_bytes);
    }
    if (at < end) {
      const int rest = static_cast<int>(end - at);
      pack_tail<Bits>(encoder.code(load_part(w + at, rest)), rest, at, row, plane_bytes);
      at = end;
    }
  }
}

static void encode(const Encoding& encoding, const float* w, int64_t n, int64_t group,
                   const float* scale, const float* zero_point, uint8_t* row) {
  with_encoder(encoding, [&](const auto& encoder) {
    encode_row(w, n, group, scale, zero_point, encoder, row);
  });
}
