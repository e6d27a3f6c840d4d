// What 128-bit registers do best, one body for every x86 target: sixteen codes to packed bytes (the
// target brings bytes_of), four rows to four columns, entries of a table; and prefetching. See
// portable.h for what each name means. Included inside the target's namespace.

static inline void transpose4(const float* const* from, int64_t at, float* out) {
  __m128 a = _mm_loadu_ps(from[0] + at), b = _mm_loadu_ps(from[1] + at);
  __m128 c = _mm_loadu_ps(from[2] + at), d = _mm_loadu_ps(from[3] + at);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + 16, b);
  _mm_storeu_ps(out + 32, c);
  _mm_storeu_ps(out + 48, d);
}

static inline void pack8(uint8_t* p, I code) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes_of(code));
}
static inline void pack4(uint8_t* p, I code) {
  // Pairs of bytes times 16 and 1, added, are words below 256.
  const __m128i words = _mm_maddubs_epi16(bytes_of(code), _mm_set1_epi16(0x0110));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
static inline void pack2(uint8_t* p, I code) {
  const __m128i low = _mm_and_si128(bytes_of(code), _mm_set1_epi8(3));
  const __m128i pairs = _mm_maddubs_epi16(low, _mm_set1_epi16(0x0104));
  const __m128i quads = _mm_madd_epi16(pairs, _mm_set1_epi32(0x00010010));
  const __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(quads, quads), quads);
  const int packed = _mm_cvtsi128_si32(bytes);
  memcpy(p, &packed, 4);
}
static inline void pack_bit2(uint8_t* p, I code) {
  // movemask collects the top bit of each byte, the first in bit 0: hence the turned order.
  const __m128i turn = _mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8);
  const __m128i bytes = _mm_shuffle_epi8(bytes_of(code), turn);
  const int bits = _mm_movemask_epi8(_mm_slli_epi16(bytes, 5));
  memcpy(p, &bits, 2);
}

// Loads and inserts: a gather takes half as long again.
static inline __m128 pick_four(const float* table, const uint8_t* at) {
  __m128 v = _mm_load_ss(table + at[0]);
  v = _mm_insert_ps(v, _mm_load_ss(table + at[1]), 0x10);
  v = _mm_insert_ps(v, _mm_load_ss(table + at[2]), 0x20);
  return _mm_insert_ps(v, _mm_load_ss(table + at[3]), 0x30);
}

// Inlined by force: g++ drops calls to what does nothing but prefetch.
[[gnu::always_inline]] static inline void prefetch(const void* p) { _mm_prefetch(p, _MM_HINT_T0); }
[[gnu::always_inline]] static inline void prefetch_far(const void* p) {
  _mm_prefetch(p, _MM_HINT_T1);
}
