// Integer lanes: what codes and integer products need, as AVX-512 registers; see portable_dot.h for
// what each name means. Included inside the target's namespace, after avx512.h.

constexpr int kTileRows = 12;  // times two panels: their sums leave 8 of 32 registers
constexpr int kTilePanels = 2;
constexpr int kWalkedRows = 4;    // beyond, panels are faster
constexpr int kRowsTogether = 2;  // of the weight: they share what is loaded of activations
constexpr bool kExpandingCosts = false;

static inline I load_i(const void* p) { return _mm512_loadu_si512(p); }
// Not once per use, as the compiler may choose: codes need not lie on cache lines, and a load of
// two lines costs several.
static inline I load_once(const void* p) {
  I x = load_i(p);
  __asm__("" : "+v"(x));
  return x;
}
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
            : "+&v"(a), "+&v"(b), "=&v"(x)
            : "v"(w0), "v"(w1), "m"(*static_cast<const __m512i_u*>(p)));
  } else {
    __asm__("vmovdqu64 %5, %2\n\tvpdpbusd %2, %3, %0\n\tvpdpbusd %2, %4, %1"
            : "+&v"(a), "+&v"(b), "=&v"(x)
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
template <bool kOfWords, bool kSmall>
[[gnu::always_inline]] static inline void dot_twice_with(I* sum0, I* sum1, I w0, I w1,
                                                         const void* p) {
#ifdef __AVX512VNNI__
  I a = *sum0, b = *sum1, x;
  if constexpr (kOfWords) {
    __asm__("vpbroadcastd %5, %2\n\tvpdpwssd %2, %3, %0\n\tvpdpwssd %2, %4, %1"
            : "+&v"(a), "+&v"(b), "=&v"(x)
            : "v"(w0), "v"(w1), "m"(*static_cast<const int32_t*>(p)));
  } else {
    __asm__("vpbroadcastd %5, %2\n\tvpdpbusd %2, %3, %0\n\tvpdpbusd %2, %4, %1"
            : "+&v"(a), "+&v"(b), "=&v"(x)
            : "v"(w0), "v"(w1), "m"(*static_cast<const int32_t*>(p)));
  }
  *sum0 = a;
  *sum1 = b;
#else
  const I x = broadcast_i(p);
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

template <int kTurned>
[[gnu::always_inline]] static inline void turn_lanes(I* x) {
  if constexpr (kTurned == 4) {
    const I a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const I c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi64(a, c);
    x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d);
    x[3] = _mm512_unpackhi_epi64(b, d);
  } else if constexpr (kTurned == 2) {
    const F a = _mm512_castsi512_ps(x[0]), b = _mm512_castsi512_ps(x[1]);
    x[0] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
    x[1] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
  }
}
[[gnu::always_inline]] static inline void transpose(I* t) {
  I x[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) turn_lanes<4>(t + i);
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
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) t[i] = x[i];
}
template <class Join>
static inline F join_lanes(const float* rows, const Join& join) {
  F x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = load(rows + 16 * i);
  // Each step joins halves of two vectors and leaves one, until a lane is a row; rows are paired so
  // that the last step finds them in order.
  F y[8], z[4], v[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const F a = x[i % 4 + i / 4 * 8], b = x[i % 4 + i / 4 * 8 + 4];
    y[i] = join(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    z[i] = join(_mm512_shuffle_f32x4(y[i], y[i + 4], 0x88),
                _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    v[i] = join(_mm512_shuffle_ps(z[2 * i], z[2 * i + 1], 0x44),
                _mm512_shuffle_ps(z[2 * i], z[2 * i + 1], 0xee));
  return join(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xdd));
}
static inline F pick(const float* table, const uint8_t* at) {
  const __m256 low = _mm256_set_m128(pick_four(table, at + 4), pick_four(table, at));
  const __m256 high = _mm256_set_m128(pick_four(table, at + 12), pick_four(table, at + 8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// 256 floats by words: sixteen look-ups of words give 32 entries.
struct WideTable {
  I low[8], high[8];
};
static inline WideTable wide_table(const float* entries) {
  int16_t even[32];
  for (int i = 0; i < 32; ++i) even[i] = static_cast<int16_t>(2 * i);
  const I at = load_i(even), next = _mm512_add_epi16(at, set1_16(1));
  WideTable t;
  for (int i = 0; i < 8; ++i) {
    const I a = load_i(entries + 32 * i), b = load_i(entries + 32 * i + 16);
    t.low[i] = _mm512_permutex2var_epi16(a, at, b);
    t.high[i] = _mm512_permutex2var_epi16(a, next, b);
  }
  return t;
}
static inline I lookup_words_wide(const I* table, I at, __mmask32 bit6, __mmask32 bit7) {
  const I a = _mm512_permutex2var_epi16(table[0], at, table[1]);
  const I b = _mm512_permutex2var_epi16(table[2], at, table[3]);
  const I c = _mm512_permutex2var_epi16(table[4], at, table[5]);
  const I d = _mm512_permutex2var_epi16(table[6], at, table[7]);
  return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, a, b),
                                 _mm512_mask_blend_epi16(bit6, c, d));
}
static inline void lookup_wide(const WideTable& table, const uint8_t* at, F* out) {
  // In the order that interleaving words inside of 128 bits undoes.
  const I order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const I words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  const I index = _mm512_permutexvar_epi64(order, words);
  const __mmask32 bit6 = _mm512_test_epi16_mask(index, set1_16(64));
  const __mmask32 bit7 = _mm512_test_epi16_mask(index, set1_16(128));
  const I low = lookup_words_wide(table.low, index, bit6, bit7);
  const I high = lookup_words_wide(table.high, index, bit6, bit7);
  out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
  out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}

static inline I narrow_words(const int32_t* q) {
  const __m256i low = _mm512_cvtepi32_epi16(load_i(q)),
                high = _mm512_cvtepi32_epi16(load_i(q + 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
static inline void place_words(const int32_t* q, const uint8_t* order, uint8_t* out) {
  const I low = narrow_words(q), high = narrow_words(q + 32);
  for (int i = 0; i < 64; i += 32) {
    const I at =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(order + i)));
    store_i(out + 2 * i, _mm512_permutex2var_epi16(low, at, high));
  }
}
static inline void place_bytes(const int32_t* q, const uint8_t* order, uint8_t* out) {
  const auto narrow = [q](int i) { return _mm512_cvtepi32_epi8(load_i(q + i)); };
  I bytes = _mm512_castsi128_si512(narrow(0));
  bytes = _mm512_inserti32x4(bytes, narrow(16), 1);
  bytes = _mm512_inserti32x4(bytes, narrow(32), 2);
  bytes = _mm512_inserti32x4(bytes, narrow(48), 3);
  store_i(out, _mm512_shuffle_epi8(bytes, load_i(order)));  // none leaves its sixteen
}
