// Sixteen float lanes as one AVX-512 register; see portable.h for what each name means.
// Included inside the target's namespace.

using F = __m512;
using I = __m512i;

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
static inline F min(F x, F y) { return _mm512_min_ps(x, y); }
static inline F max(F x, F y) { return _mm512_max_ps(x, y); }
static inline F round_even(F x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline I zero_i() { return _mm512_setzero_si512(); }
static inline I count_above(I n, F x, F pivot) {
  return _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(x, pivot, _CMP_GT_OQ), n, _mm512_set1_epi32(1));
}
static inline I to_int(F x) { return _mm512_cvttps_epi32(x); }
static inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
static inline F lookup(const float* table16, I at) { return _mm512_permutexvar_ps(at, _mm512_loadu_ps(table16)); }
static inline void store_bytes(uint8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

static inline int big_endian32(const uint8_t* p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return static_cast<int>(__builtin_bswap32(v));
}
static inline I unpack8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline I unpack4(const uint8_t* p) {
  const __m512i bits = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(big_endian32(p))),
                                          _mm256_set1_epi32(big_endian32(p + 4)), 1);
  return _mm512_srlv_epi32(bits, _mm512_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0));
}
static inline I unpack4_exact(const uint8_t* p) { return _mm512_and_si512(unpack4(p), _mm512_set1_epi32(15)); }
static inline I unpack2(const uint8_t* p) {
  const __m512i shift = _mm512_setr_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(big_endian32(p)), shift), _mm512_set1_epi32(3));
}
static inline I unpack1(const uint8_t* p) {
  const __m512i shift = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(p[0] << 8 | p[1]), shift), _mm512_set1_epi32(1));
}
static inline I shift_or(I high, int shift, I low) {
  return _mm512_or_si512(_mm512_slli_epi32(high, static_cast<unsigned>(shift)), low);
}

static inline F load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store_half(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline float half_scalar(uint16_t h) { return _cvtsh_ss(h); }

static inline F load_bfloat16(const uint16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline void store_bfloat16(uint16_t* p, F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16)));
}
