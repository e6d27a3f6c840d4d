// Sixteen float lanes in plain C++; the compiler may use whatever vectors the baseline CPU has. The
// same names exist in avx2.h and avx512.h, and each lane computes the same bits there. Included
// inside the target's namespace.

struct F {
  float lane[16];
};
struct I {
  int32_t lane[16];
};

constexpr int kSumsInRegisters = 4;  // that leave enough of them for other things

#define BITFOLD_LANES for (int i = 0; i < 16; ++i)

static inline F set1(float a) {
  F r;
  BITFOLD_LANES r.lane[i] = a;
  return r;
}
static inline F zero() { return set1(0.0f); }
static inline F load(const float* p) {
  F r;
  memcpy(r.lane, p, sizeof r.lane);
  return r;
}
static inline void store(float* p, F a) { memcpy(p, a.lane, sizeof a.lane); }
static inline F load_part(const float* p, int n) {
  F r = zero();
  memcpy(r.lane, p, sizeof(float) * n);
  return r;
}
static inline void store_part(float* p, F a, int n) { memcpy(p, a.lane, sizeof(float) * n); }
static inline F add(F a, F b) {
  BITFOLD_LANES a.lane[i] += b.lane[i];
  return a;
}
static inline F sub(F a, F b) {
  BITFOLD_LANES a.lane[i] -= b.lane[i];
  return a;
}
static inline F mul(F a, F b) {
  BITFOLD_LANES a.lane[i] *= b.lane[i];
  return a;
}
static inline F fma(F a, F b, F c) {
  BITFOLD_LANES c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
static inline F div(F a, F b) {
  BITFOLD_LANES a.lane[i] /= b.lane[i];
  return a;
}
// The second operand wins where one is NaN, as on x86.
static inline F min(F a, F b) {
  BITFOLD_LANES a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
static inline F max(F a, F b) {
  BITFOLD_LANES a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
// min(max(a, 0), top), for no NaN.
static inline F clamp_code(F a, F top) { return min(max(a, zero()), top); }
static inline F round_even(F a) {
  // Adding 1.5 * 2^23 leaves no fraction bits; larger magnitudes are clamped by the callers before
  // they matter.
  BITFOLD_LANES {
    const float limited =
        a.lane[i] < 4194304.0f ? (a.lane[i] > -4194304.0f ? a.lane[i] : -4194304.0f) : 4194304.0f;
    a.lane[i] = (limited + 12582912.0f) - 12582912.0f;
  }
  return a;
}
// Lanes are added in one order on every target: i with i + 8, then + 4, + 2, + 1.
static inline float reduce_add(F a) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) a.lane[i] += a.lane[i + step];
  }
  return a.lane[0];
}
static inline float reduce_min(F a) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i)
      a.lane[i] = a.lane[i] < a.lane[i + step] ? a.lane[i] : a.lane[i + step];
  }
  return a.lane[0];
}
static inline float reduce_max(F a) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i)
      a.lane[i] = a.lane[i] > a.lane[i + step] ? a.lane[i] : a.lane[i + step];
  }
  return a.lane[0];
}
static inline F abs(F a) {
  BITFOLD_LANES a.lane[i] = __builtin_fabsf(a.lane[i]);
  return a;
}
static inline F sqrt(F a) {
  BITFOLD_LANES a.lane[i] = __builtin_sqrtf(a.lane[i]);
  return a;
}
// a > b ? yes : no
static inline F select_above(F a, F b, F yes, F no) {
  BITFOLD_LANES yes.lane[i] = a.lane[i] > b.lane[i] ? yes.lane[i] : no.lane[i];
  return yes;
}
static inline I zero_i() {
  I r;
  BITFOLD_LANES r.lane[i] = 0;
  return r;
}
// Bit i of `lanes` chooses lane i of `yes`.
static inline F select_lanes(int lanes, F yes, F no) {
  BITFOLD_LANES yes.lane[i] = lanes >> i & 1 ? yes.lane[i] : no.lane[i];
  return yes;
}
// n | bit where a > b.
static inline I set_bit_above(I n, F a, F b, int bit) {
  BITFOLD_LANES n.lane[i] |= a.lane[i] > b.lane[i] ? bit : 0;
  return n;
}
static inline I to_int(F a) {
  I r;
  BITFOLD_LANES r.lane[i] = static_cast<int32_t>(a.lane[i]);
  return r;
}
static inline F to_float(I a) {
  F r;
  BITFOLD_LANES r.lane[i] = static_cast<float>(a.lane[i]);
  return r;
}
// For positive normal x: the largest n with 2^n <= x, and x / 2^n in [1, 2).
static inline F exponent_of(F x) {
  BITFOLD_LANES x.lane[i] = static_cast<float>(bits_from_float(x.lane[i]) >> 23) - 127.0f;
  return x;
}
static inline F mantissa_of(F x) {
  BITFOLD_LANES x.lane[i] = float_from_bits((bits_from_float(x.lane[i]) & 0x7fffffu) | 0x3f800000u);
  return x;
}
// 2^n for whole n from -126 to 127.
static inline F power_of_two(F n) {
  BITFOLD_LANES n.lane[i] = float_from_bits((static_cast<uint32_t>(n.lane[i] + 127.0f)) << 23);
  return n;
}
static inline F lookup(F table, I at) {
  F r;
  BITFOLD_LANES r.lane[i] = table.lane[at.lane[i] & 15];
  return r;
}
// The same for tables of which only the first eight entries are asked for.
static inline F lookup8(F table, I at) { return lookup(table, at); }
static inline I lookup_int(I table, I at) {
  I r;
  BITFOLD_LANES r.lane[i] = table.lane[at.lane[i] & 15];
  return r;
}

// Bit i is set where lane i of a is above that of b.
static inline int lanes_above(F a, F b) {
  int mask = 0;
  BITFOLD_LANES mask |= (a.lane[i] > b.lane[i] ? 1 : 0) << i;
  return mask;
}

// Two words in each lane. From floats, rounded to nearest even and within 16 bits: `low` and
// `high`.
static inline I pair_words(F low, F high) {
  low = round_even(low);
  high = round_even(high);
  I r;
  BITFOLD_LANES {
    const int16_t pair[2] = {static_cast<int16_t>(low.lane[i]), static_cast<int16_t>(high.lane[i])};
    memcpy(&r.lane[i], pair, sizeof pair);
  }
  return r;
}
// The low 16 bits of value(i) in word i.
template <class Value>
static inline I make_words(const Value& value) {
  int16_t word[32];
  for (int i = 0; i < 32; ++i) word[i] = static_cast<int16_t>(value(i));
  I r;
  memcpy(r.lane, word, sizeof word);
  return r;
}
template <class Op>
static inline I each_word(I a, I b, const Op& op) {
  int16_t x[32], y[32];
  memcpy(x, a.lane, sizeof x);
  memcpy(y, b.lane, sizeof y);
  return make_words([&](int i) { return op(x[i], y[i]); });
}
static inline I add_16(I a, I b) {
  return each_word(a, b, [](int x, int y) { return x + y; });
}
static inline I min_16(I a, I b) {
  return each_word(a, b, [](int x, int y) { return x < y ? x : y; });
}
static inline I max_16(I a, I b) {
  return each_word(a, b, [](int x, int y) { return x > y ? x : y; });
}
// a * b / 2^15, rounded to nearest.
static inline I scale_16(I a, I b) {
  return each_word(a, b, [](int x, int y) { return (x * y + (1 << 14)) >> 15; });
}

// Sixteen codes to 16, 8, 4 and 2 bytes, first element in the high bits: the inverse of unpack8,
// unpack4 (codes below 16), unpack2 (of the low two bits) and add_bit2 (of bit 2).
static inline void pack8(uint8_t* p, I a) { BITFOLD_LANES p[i] = static_cast<uint8_t>(a.lane[i]); }
static inline void pack4(uint8_t* p, I a) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<uint8_t>(a.lane[2 * i] << 4 | a.lane[2 * i + 1]);
}
static inline void pack2(uint8_t* p, I a) {
  for (int i = 0; i < 4; ++i) {
    p[i] = static_cast<uint8_t>((a.lane[4 * i] & 3) << 6 | (a.lane[4 * i + 1] & 3) << 4 |
                                (a.lane[4 * i + 2] & 3) << 2 | (a.lane[4 * i + 3] & 3));
  }
}
static inline void pack_bit2(uint8_t* p, I a) {
  p[0] = p[1] = 0;
  BITFOLD_LANES p[i / 8] |= static_cast<uint8_t>((a.lane[i] >> 2 & 1) << (7 - i % 8));
}

// Sixteen codes from 16, 8 and 4 bytes, first element in the high bits; add_bit2 adds 4 where one
// of sixteen single bits is set. unpack4 may leave higher bits set, which lookup ignores.
static inline I unpack8(const uint8_t* p) {
  I r;
  BITFOLD_LANES r.lane[i] = p[i];
  return r;
}
static inline I unpack4(const uint8_t* p) {
  I r;
  BITFOLD_LANES r.lane[i] = p[i / 2] >> (i % 2 ? 0 : 4);
  return r;
}
static inline I unpack2(const uint8_t* p) {
  I r;
  BITFOLD_LANES r.lane[i] = (p[i / 4] >> (6 - 2 * (i % 4))) & 3;
  return r;
}
static inline I add_bit2(I code, const uint8_t* p) {
  BITFOLD_LANES code.lane[i] |= ((p[i / 8] >> (7 - i % 8)) & 1) << 2;
  return code;
}

static inline F load_half(const uint16_t* p) {
  F r;
  BITFOLD_LANES r.lane[i] = half_to_float(p[i]);
  return r;
}
static inline void store_half(uint16_t* p, F a) { BITFOLD_LANES p[i] = float_to_half(a.lane[i]); }

static inline F load_bfloat16(const uint16_t* p) {
  F r;
  BITFOLD_LANES r.lane[i] = bfloat16_to_float(p[i]);
  return r;
}
static inline void store_bfloat16(uint16_t* p, F a) {
  BITFOLD_LANES p[i] = float_to_bfloat16(a.lane[i]);
}

// Thirty-two codes as 16-bit words, and anything above their bits: from 16, 8, or 8 and 4 bytes.
static inline I words_of_4(const uint8_t* p) {
  return make_words([p](int i) { return p[i / 2] >> (i % 2 ? 0 : 4); });
}
static inline I words_of_2(const uint8_t* p) {
  return make_words([p](int i) { return p[i / 4] >> (6 - 2 * (i % 4)); });
}
static inline I words_of_3(const uint8_t* p, const uint8_t* third) {
  return make_words([p, third](int i) {
    return (p[i / 4] >> (6 - 2 * (i % 4)) & 3) | (third[i / 8] >> (7 - i % 8) & 1) << 2;
  });
}
// Sixteen levels as halves of either kind; the index of a word is its low four bits.
struct HalfTable {
  uint16_t entry[16];
};
static inline HalfTable half_table(F levels) {
  HalfTable t;
  store_half(t.entry, levels);
  return t;
}
static inline HalfTable bfloat16_table(F levels) {
  HalfTable t;
  store_bfloat16(t.entry, levels);
  return t;
}
static inline I lookup_halves(const HalfTable& table, I at) {
  int16_t word[32];
  memcpy(word, at.lane, sizeof word);
  return make_words([&](int i) { return table.entry[word[i] & 15]; });
}

// out[16 * i + lane] = from[lane][at + i] for i, lane < 4.
static inline void transpose4(const float* const* from, int64_t at, float* out) {
  for (int lane = 0; lane < 4; ++lane) {
    for (int i = 0; i < 4; ++i) out[16 * i + lane] = from[lane][at + i];
  }
}

// Stores around the caches, where a target has them; p on a multiple of the vector's size.
static inline void stream(float* p, F a) { store(p, a); }
static inline void stream_half(uint16_t* p, F a) { store_half(p, a); }
static inline void stream_bfloat16(uint16_t* p, F a) { store_bfloat16(p, a); }

static inline void stream_i(void* p, I a) { memcpy(p, a.lane, sizeof a.lane); }

#undef BITFOLD_LANES
