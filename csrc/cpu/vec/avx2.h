// Sixteen float lanes as two AVX2 registers; see portable.h for what each name means.
// Included inside the target's namespace.

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};

constexpr int kSumsInRegisters = 4;

static inline F set1(float v) {
  const __m256 x = _mm256_set1_ps(v);
  return {x, x};
}
static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
static inline F load_part(const float* p, int n) {
  alignas(32) float t[16] = {};
  memcpy(t, p, sizeof(float) * n);
  return load(t);
}
static inline void store_part(float* p, F v, int n) {
  alignas(32) float t[16];
  store(t, v);
  memcpy(p, t, sizeof(float) * n);
}
static inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F clamp_code(F x, F top) { return min(max(x, zero()), top); }
static inline F round_even(F x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
// Lanes are added in one order on every target: i with i + 8, then + 4, + 2, + 1.
static inline float reduce_add(F x) {
  const __m256 a = _mm256_add_ps(x.a, x.b);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
static inline float reduce_min(F x) {
  const __m256 a = _mm256_min_ps(x.a, x.b);
  const __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_min_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_min_ss(c, _mm_movehdup_ps(c)));
}
static inline float reduce_max(F x) {
  const __m256 a = _mm256_max_ps(x.a, x.b);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
static inline F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
static inline int lanes_above(F x, F y) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)) |
         _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)) << 8;
}
static inline F select_above(F x, F y, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
}
static inline __m256 select_eight(int lanes, __m256 yes, __m256 no) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(lanes), bit);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
}
static inline F select_lanes(int lanes, F yes, F no) {
  return {select_eight(lanes, yes.a, no.a), select_eight(lanes >> 8, yes.b, no.b)};
}
static inline I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline __m256i bit_above(__m256 x, __m256 y, int bit) {
  return _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_GT_OQ)),
                          _mm256_set1_epi32(bit));
}
static inline I set_bit_above(I n, F x, F y, int bit) {
  return {_mm256_or_si256(n.a, bit_above(x.a, y.a, bit)),
          _mm256_or_si256(n.b, bit_above(x.b, y.b, bit))};
}
static inline I to_int(F x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
static inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline __m256 exponent_half(__m256 x) {
  const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(exponent, _mm256_set1_epi32(127)));
}
static inline F exponent_of(F x) { return {exponent_half(x.a), exponent_half(x.b)}; }
static inline __m256 mantissa_half(__m256 x) {
  const __m256 fraction = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffff)));
  return _mm256_or_ps(fraction, _mm256_set1_ps(1.0f));
}
static inline F mantissa_of(F x) { return {mantissa_half(x.a), mantissa_half(x.b)}; }
static inline __m256 power_half(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
static inline F power_of_two(F n) { return {power_half(n.a), power_half(n.b)}; }
static inline __m256 lookup_half(__m256 low, __m256 high, __m256i at) {
  // vpermps reads three index bits; bit 3, moved to the sign, chooses between the two halves of the
  // table.
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at),
                          _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}
static inline F lookup(F table, I at) {
  return {lookup_half(table.a, table.b, at.a), lookup_half(table.a, table.b, at.b)};
}
static inline F lookup8(F table, I at) {
  return {_mm256_permutevar8x32_ps(table.a, at.a), _mm256_permutevar8x32_ps(table.a, at.b)};
}
static inline I lookup_int(I table, I at) {
  const F found = lookup({_mm256_castsi256_ps(table.a), _mm256_castsi256_ps(table.b)}, at);
  return {_mm256_castps_si256(found.a), _mm256_castps_si256(found.b)};
}

static inline __m256i pair_words_half(__m256 low, __m256 high) {
  return _mm256_blend_epi16(_mm256_cvtps_epi32(low),
                            _mm256_slli_epi32(_mm256_cvtps_epi32(high), 16), 0xaa);
}
static inline I pair_words(F low, F high) {
  return {pair_words_half(low.a, high.a), pair_words_half(low.b, high.b)};
}
static inline I add_16(I x, I y) {
  return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)};
}
static inline I min_16(I x, I y) {
  return {_mm256_min_epi16(x.a, y.a), _mm256_min_epi16(x.b, y.b)};
}
static inline I max_16(I x, I y) {
  return {_mm256_max_epi16(x.a, y.a), _mm256_max_epi16(x.b, y.b)};
}
static inline I scale_16(I x, I y) {
  return {_mm256_mulhrs_epi16(x.a, y.a), _mm256_mulhrs_epi16(x.b, y.b)};
}

static inline __m128i bytes_of(I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

static inline uint32_t big_endian32(const uint8_t* p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return __builtin_bswap32(v);
}
static inline I unpack8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline I unpack4(const uint8_t* p) {
  const __m256i shift = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
  return {_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(big_endian32(p))), shift),
          _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(big_endian32(p + 4))), shift)};
}
static inline I mask_i(I x, int mask) {
  const __m256i m = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
static inline I unpack2(const uint8_t* p) {
  const __m256i bits = _mm256_set1_epi32(static_cast<int>(big_endian32(p)));
  return mask_i({_mm256_srlv_epi32(bits, _mm256_setr_epi32(30, 28, 26, 24, 22, 20, 18, 16)),
                 _mm256_srlv_epi32(bits, _mm256_setr_epi32(14, 12, 10, 8, 6, 4, 2, 0))},
                3);
}
static inline __m256i bit2_where(__m256i words, __m256i bit) {
  return _mm256_and_si256(_mm256_cmpeq_epi32(_mm256_and_si256(words, bit), bit),
                          _mm256_set1_epi32(4));
}
static inline I add_bit2(I code, const uint8_t* p) {
  const __m256i bit = _mm256_setr_epi32(0x80, 0x40, 0x20, 0x10, 8, 4, 2, 1);
  return {_mm256_or_si256(code.a, bit2_where(_mm256_set1_epi32(p[0]), bit)),
          _mm256_or_si256(code.b, bit2_where(_mm256_set1_epi32(p[1]), bit))};
}

// Every word gets the byte that holds its code (one load, broadcast, and a byte shuffle); a product
// moves all codes to one place, since words have no shifts of their own.
struct WordCodes {
  int16_t byte4[32], factor4[32], byte2[32], factor2[32], byte1[32], factor1[32];
};
constexpr WordCodes make_word_codes() {
  WordCodes w{};
  for (int i = 0; i < 32; ++i) {
    w.byte4[i] = static_cast<int16_t>(-0x8000 + i / 2);
    w.factor4[i] = static_cast<int16_t>(i % 2 ? 16 : 1);
    w.byte2[i] = static_cast<int16_t>(-0x8000 + i / 4);
    w.factor2[i] = static_cast<int16_t>(1 << 2 * (i % 4));
    w.byte1[i] = static_cast<int16_t>(-0x8000 + i / 8);
    w.factor1[i] = static_cast<int16_t>(1 << i % 8);
  }
  return w;
}
alignas(32) constexpr WordCodes kWordCodes = make_word_codes();
template <int Shift>
static inline I word_codes(__m256i bytes, const int16_t* byte, const int16_t* factor) {
  const auto half = [&](int at) {
    const __m256i pick = _mm256_load_si256(reinterpret_cast<const __m256i*>(byte + at));
    const __m256i by = _mm256_load_si256(reinterpret_cast<const __m256i*>(factor + at));
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, pick), by), Shift);
  };
  return {half(0), half(16)};
}
static inline I words_of_4(const uint8_t* p) {
  const __m256i bytes =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return word_codes<4>(bytes, kWordCodes.byte4, kWordCodes.factor4);
}
static inline I words_of_2(const uint8_t* p) {
  int64_t bytes;
  memcpy(&bytes, p, 8);
  return word_codes<6>(_mm256_set1_epi64x(bytes), kWordCodes.byte2, kWordCodes.factor2);
}
static inline I words_of_3(const uint8_t* p, const uint8_t* third) {
  int32_t bits;
  memcpy(&bits, third, 4);
  const I above = word_codes<5>(_mm256_set1_epi32(bits), kWordCodes.byte1, kWordCodes.factor1);
  const I low = words_of_2(p);
  const __m256i two = _mm256_set1_epi16(3);
  return {_mm256_or_si256(_mm256_and_si256(two, low.a), _mm256_andnot_si256(two, above.a)),
          _mm256_or_si256(_mm256_and_si256(two, low.b), _mm256_andnot_si256(two, above.b))};
}

static inline F load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline __m256i half_bits(F x) {
  return _mm256_set_m128i(_mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_half(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half_bits(x));
}

static inline __m256 widen_bfloat16(const uint16_t* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
static inline F load_bfloat16(const uint16_t* p) {
  return {widen_bfloat16(p), widen_bfloat16(p + 8)};
}
static inline __m256i narrow_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
static inline __m256i bfloat16_bits(F x) {
  const __m256i words = _mm256_packus_epi32(narrow_bfloat16(x.a), narrow_bfloat16(x.b));
  return _mm256_permute4x64_epi64(words, 0xd8);
}
static inline void store_bfloat16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x));
}

struct HalfTable {
  __m256i low, high;  // bytes of the sixteen entries, twice over
};
static inline HalfTable half_table_of(__m256i words) {
  const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(255));
  const __m256i bytes =
      _mm256_permute4x64_epi64(_mm256_packus_epi16(low, _mm256_srli_epi16(words, 8)), 0xd8);
  return {_mm256_permute2x128_si256(bytes, bytes, 0x00),
          _mm256_permute2x128_si256(bytes, bytes, 0x11)};
}
static inline HalfTable half_table(F levels) { return half_table_of(half_bits(levels)); }
static inline HalfTable bfloat16_table(F levels) { return half_table_of(bfloat16_bits(levels)); }
static inline __m256i lookup_halves_half(const HalfTable& table, __m256i at) {
  const __m256i index = _mm256_and_si256(at, _mm256_set1_epi16(15));
  const __m256i low = _mm256_shuffle_epi8(table.low, index);
  const __m256i high = _mm256_shuffle_epi8(table.high, index);
  return _mm256_blendv_epi8(low, _mm256_slli_epi16(high, 8),
                            _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
}
static inline I lookup_halves(const HalfTable& table, I at) {
  return {lookup_halves_half(table, at.a), lookup_halves_half(table, at.b)};
}

static inline void stream_i(void* p, I x) {
  _mm256_stream_si256(static_cast<__m256i*>(p), x.a);
  _mm256_stream_si256(static_cast<__m256i*>(p) + 1, x.b);
}
static inline void stream(float* p, F x) {
  _mm256_stream_ps(p, x.a);
  _mm256_stream_ps(p + 8, x.b);
}
static inline void stream_half(uint16_t* p, F x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half_bits(x));
}
static inline void stream_bfloat16(uint16_t* p, F x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x));
}
