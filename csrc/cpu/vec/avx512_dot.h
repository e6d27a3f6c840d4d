// Integer lanes: what codes and integer products need, as AVX-512 registers; see portable_dot.h for
// what each name means. Included inside the target's namespace, after avx512.h.

constexpr int kTileRows = 12;   // their integer and float sums leave 8 of 32 registers
constexpr int kWalkedRows = 4;  // beyond, panels are faster
constexpr bool kExpandingCosts = false;

static inline I load_i(const void* p) { return _mm512_loadu_si512(p); }
static inline void store_i(void* p, I x) { _mm512_storeu_si512(p, x); }
static inline I load_half_i(const void* p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
static inline I load_bytes(const uint8_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p);
}
static inline I broadcast_i(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
static inline I set1_16(int v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
static inline I and_i(I x, I y) { return _mm512_and_si512(x, y); }
static inline I or_i(I x, I y) { return _mm512_or_si512(x, y); }
static inline I select_bits(I mask, I x, I y) {
  return _mm512_ternarylogic_epi32(mask, x, y, 0xca);
}
static inline I add_i(I x, I y) { return _mm512_add_epi32(x, y); }
static inline I sub_16(I x, I y) { return _mm512_sub_epi16(x, y); }
static inline I shift_left_i(I x, int n) { return _mm512_slli_epi32(x, static_cast<unsigned>(n)); }
static inline I shift_left_16(I x, int n) { return _mm512_slli_epi16(x, static_cast<unsigned>(n)); }
static inline I shift_right_16(I x, int n) {
  return _mm512_srli_epi16(x, static_cast<unsigned>(n));
}
static inline I widen_bytes(I x) { return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(x)); }

using WordTable = __m512i;
static inline WordTable word_table(const int16_t* entries) { return load_i(entries); }
static inline I lookup_words(const WordTable& table, I at) {
  return _mm512_permutexvar_epi16(at, table);
}
using ByteTable = __m512i;
static inline ByteTable byte_table(const uint8_t* entries) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
}
static inline I lookup_bytes(const ByteTable& table, I at) {
  return _mm512_shuffle_epi8(table, at);
}

// The VNNI instructions in assembly: from the intrinsics g++ 12 copies every sum twice per product
// and spills half of a tile, which halves the speed.
static inline I dot_words(I sum, I w, I x) {
#ifdef __AVX512VNNI__
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
#endif
}
template <bool kSmall>
static inline I dot_bytes(I sum, I w, I x) {
#ifdef __AVX512VNNI__
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
#else
  if constexpr (kSmall) {
    return _mm512_add_epi32(sum,
                            _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
  }
  const I even =
      _mm512_madd_epi16(and_i(w, set1_16(0xff)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const I odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
}
// Both sums with 64 bytes at p. In one piece: loads that the compiler moves ahead leave it short of
// registers.
template <bool kOfWords, bool kSmall>
[[gnu::always_inline]] static inline void dot_twice(I* sum0, I* sum1, I w0, I w1, const void* p) {
#ifdef __AVX512VNNI__
  I a = *sum0, b = *sum1, x;  // operands in memory would stay there
  if constexpr (kOfWords) {
    __asm__("vmovdqu64 %5, %2\n\tvpdpwssd %2, %3, %0\n\tvpdpwssd %2, %4, %1"
            : "+v"(a), "+v"(b), "=&v"(x)
            : "v"(w0), "v"(w1), "m"(*static_cast<const __m512i_u*>(p)));
  } else {
    __asm__("vmovdqu64 %5, %2\n\tvpdpbusd %2, %3, %0\n\tvpdpbusd %2, %4, %1"
            : "+v"(a), "+v"(b), "=&v"(x)
            : "v"(w0), "v"(w1), "m"(*static_cast<const __m512i_u*>(p)));
  }
  *sum0 = a;
  *sum1 = b;
#else
  const I x = load_i(p);
  *sum0 = kOfWords ? dot_words(*sum0, w0, x) : dot_bytes<kSmall>(*sum0, w0, x);
  *sum1 = kOfWords ? dot_words(*sum1, w1, x) : dot_bytes<kSmall>(*sum1, w1, x);
#endif
}
// The same with four bytes at p in every lane.
static inline I dot_words_with(I sum, I w, const void* p) {
#ifdef __AVX512VNNI__
  __asm__("vpdpwssd %2%{1to16%}, %1, %0"
          : "+v"(sum)
          : "v"(w), "m"(*static_cast<const int32_t*>(p)));
  return sum;
#else
  return dot_words(sum, w, broadcast_i(p));
#endif
}
template <bool kSmall>
static inline I dot_bytes_with(I sum, I w, const void* p) {
#ifdef __AVX512VNNI__
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(sum)
          : "v"(w), "m"(*static_cast<const int32_t*>(p)));
  return sum;
#else
  return dot_bytes<kSmall>(sum, w, broadcast_i(p));
#endif
}

[[gnu::always_inline]] static inline void transpose(I* x) {
  I t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 inside each 128-bit lane
    const I a = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    const I b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const I c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
    const I d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // then the lanes themselves
    const I a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    const I b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const I c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const I d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    x[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}
static inline F pick(const float* table, const uint8_t* at) {
  const __m256 low = _mm256_set_m128(pick_four(table, at + 4), pick_four(table, at));
  const __m256 high = _mm256_set_m128(pick_four(table, at + 12), pick_four(table, at + 8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

static inline I narrow_words(const int32_t* q) {
  const __m256i low = _mm512_cvtepi32_epi16(load_i(q)),
                high = _mm512_cvtepi32_epi16(load_i(q + 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
static inline void place_words(const int32_t* q, const int16_t* order, int64_t n, uint8_t* out) {
  if (n == 64) {  // a slab: two vectors of words
    const I low = narrow_words(q), high = narrow_words(q + 32);
    for (int i = 0; i < 64; i += 32)
      store_i(out + 2 * i, _mm512_permutex2var_epi16(low, load_i(order + i), high));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int16_t word = static_cast<int16_t>(q[order[i]]);
    memcpy(out + 2 * i, &word, sizeof word);
  }
}
