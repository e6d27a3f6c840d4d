// Sixteen float lanes as one AVX-512 register; see portable.h for what each name means.
// Included inside the target's namespace.

using F = __m512;
using I = __m512i;

constexpr int kSumsInRegisters = 8;

static inline F set1(float v) { return _mm512_set1_ps(v); }
static inline F zero() { return _mm512_setzero_ps(); }
static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
static inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
static inline F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline void store_part(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
static inline F add(F x, F y) { return _mm512_add_ps(x, y); }
static inline F sub(F x, F y) { return _mm512_sub_ps(x, y); }
static inline F mul(F x, F y) { return _mm512_mul_ps(x, y); }
static inline F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
static inline F div(F x, F y) { return _mm512_div_ps(x, y); }
static inline F min(F x, F y) { return _mm512_min_ps(x, y); }
static inline F max(F x, F y) { return _mm512_max_ps(x, y); }
static inline F clamp_code(F x, F top) {
  // As integers: the bits of positive floats ascend as they do, those of negative ones are below
  // zero, and the float adders have enough to do (measured on Zen 4).
  const I positive = _mm512_max_epi32(_mm512_castps_si512(x), _mm512_setzero_si512());
  return _mm512_castsi512_ps(_mm512_min_epi32(positive, _mm512_castps_si512(top)));
}
static inline F round_even(F x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Lanes are added in one order on every target: i with i + 8, then + 4, + 2, + 1.
static inline float reduce_add(F x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
static inline float reduce_min(F x) { return _mm512_reduce_min_ps(x); }
static inline float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
static inline F abs(F x) { return _mm512_abs_ps(x); }
static inline F sqrt(F x) { return _mm512_sqrt_ps(x); }
static inline int lanes_above(F x, F y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
static inline F select_above(F x, F y, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), no, yes);
}
static inline F select_lanes(int lanes, F yes, F no) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(lanes), no, yes);
}
static inline I zero_i() { return _mm512_setzero_si512(); }
static inline I set_bit_above(I n, F x, F y, int bit) {
  return _mm512_mask_or_epi32(n, _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), n, _mm512_set1_epi32(bit));
}
static inline I to_int(F x) { return _mm512_cvttps_epi32(x); }
static inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
static inline F exponent_of(F x) { return _mm512_getexp_ps(x); }
static inline F mantissa_of(F x) {
  return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
}
static inline F power_of_two(F n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
static inline F lookup(F table, I at) { return _mm512_permutexvar_ps(at, table); }
static inline F lookup8(F table, I at) { return lookup(table, at); }
static inline I lookup_int(I table, I at) { return _mm512_permutexvar_epi32(at, table); }

static inline I pair_words(F low, F high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_cvtps_epi32(low),
                                 _mm512_slli_epi32(_mm512_cvtps_epi32(high), 16));
}
static inline I add_16(I x, I y) { return _mm512_add_epi16(x, y); }
static inline I min_16(I x, I y) { return _mm512_min_epi16(x, y); }
static inline I max_16(I x, I y) { return _mm512_max_epi16(x, y); }
static inline I scale_16(I x, I y) { return _mm512_mulhrs_epi16(x, y); }

static inline __m128i bytes_of(I x) { return _mm512_cvtepi32_epi8(x); }

// Every 32-bit lane gets the byte that holds its code (broadcast, then a byte shuffle that zeroes
// the rest), shifted to the end.
static inline I unpack8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline I unpack4(const uint8_t* p) {
  int64_t bytes;
  memcpy(&bytes, p, 8);
  const I byte_of_lane = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const I pick = _mm512_or_si512(byte_of_lane, _mm512_set1_epi32(static_cast<int>(0x80808000u)));
  const I shift = _mm512_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0);
  return _mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi64(bytes), pick), shift);
}
static inline I unpack2(const uint8_t* p) {
  int32_t bytes;
  memcpy(&bytes, p, 4);
  const I byte_of_lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const I pick = _mm512_or_si512(byte_of_lane, _mm512_set1_epi32(static_cast<int>(0x80808000u)));
  const I shift = _mm512_setr_epi32(6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0);
  const I shifted = _mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32(bytes), pick), shift);
  return _mm512_and_si512(shifted, _mm512_set1_epi32(3));
}
static inline I add_bit2(I code, const uint8_t* p) {
  int16_t bytes;
  memcpy(&bytes, p, 2);
  // Lane i's bit inside the 16-bit word whose low byte comes first.
  const I bit = _mm512_setr_epi32(0x80, 0x40, 0x20, 0x10, 8, 4, 2, 1, 0x8000, 0x4000, 0x2000,
                                  0x1000, 0x800, 0x400, 0x200, 0x100);
  const __mmask16 set = _mm512_test_epi32_mask(_mm512_set1_epi16(bytes), bit);
  return _mm512_mask_or_epi32(code, set, code, _mm512_set1_epi32(4));
}

// Every word gets the byte that holds its code (one load, broadcast, and a byte shuffle), shifted
// to the end. Of third bits that byte is the upper one, so that all shifts go right.
struct WordCodes {
  int16_t byte4[32], shift4[32], byte2[32], shift2[32], byte1[32], shift1[32];
};
constexpr WordCodes make_word_codes() {
  WordCodes w{};
  for (int i = 0; i < 32; ++i) {
    w.byte4[i] = static_cast<int16_t>(-0x8000 + i / 2);
    w.shift4[i] = static_cast<int16_t>(i % 2 ? 0 : 4);
    w.byte2[i] = static_cast<int16_t>(-0x8000 + i / 4);
    w.shift2[i] = static_cast<int16_t>(6 - 2 * (i % 4));
    w.byte1[i] = static_cast<int16_t>(i / 8 * 256 + 0x80);
    w.shift1[i] = static_cast<int16_t>(13 - i % 8);  // to bit 2
  }
  return w;
}
alignas(64) constexpr WordCodes kWordCodes = make_word_codes();
static inline I word_codes(I bytes, const int16_t* byte, const int16_t* shift) {
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, _mm512_load_si512(byte)),
                           _mm512_load_si512(shift));
}
static inline I words_of_4(const uint8_t* p) {
  const I bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return word_codes(bytes, kWordCodes.byte4, kWordCodes.shift4);
}
static inline I words_of_2(const uint8_t* p) {
  int64_t bytes;
  memcpy(&bytes, p, 8);
  return word_codes(_mm512_set1_epi64(bytes), kWordCodes.byte2, kWordCodes.shift2);
}
static inline I words_of_3(const uint8_t* p, const uint8_t* third) {
  int32_t bits;
  memcpy(&bits, third, 4);
  const I above = word_codes(_mm512_set1_epi32(bits), kWordCodes.byte1, kWordCodes.shift1);
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), words_of_2(p), above, 0xca);
}

static inline F load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline __m256i half_bits(F x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
static inline void store_half(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half_bits(x));
}

static inline F load_bfloat16(const uint16_t* p) {
  const __m512i bits =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline __m256i bfloat16_bits(F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  const __m512i upper_half =
      _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015,
                        0x001b0019, 0x001f001d, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper_half, rounded));
}
static inline void store_bfloat16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x));
}

using HalfTable = __m512i;  // twice over
static inline HalfTable half_table(F levels) { return _mm512_broadcast_i64x4(half_bits(levels)); }
static inline HalfTable bfloat16_table(F levels) {
  return _mm512_broadcast_i64x4(bfloat16_bits(levels));
}
static inline I lookup_halves(const HalfTable& table, I at) {
  return _mm512_permutexvar_epi16(at, table);
}

static inline void stream_i(void* p, I x) { _mm512_stream_si512(static_cast<__m512i*>(p), x); }
static inline void stream(float* p, F x) { _mm512_stream_ps(p, x); }
static inline void stream_half(uint16_t* p, F x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half_bits(x));
}
static inline void stream_bfloat16(uint16_t* p, F x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x));
}
