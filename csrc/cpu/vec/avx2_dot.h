// Integer lanes: what codes and integer products need, as two AVX2 registers; see portable_dot.h
// for what each name means. Included inside the target's namespace, after avx2.h.

constexpr int kTilePanels = 1;
constexpr int kTileRows = 4;  // 4 x 2 sums, 2 weights, a broadcast and products fill 16 registers
constexpr int kWalkedRows = 1;
constexpr int kRowsTogether = 1;
constexpr bool kExpandingCosts = true;  // about as much as the products of four rows

static inline I load_i(const void* p) {
  const __m256i* at = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
static inline I load_once(const void* p) { return load_i(p); }
static inline void store_i(void* p, I x) {
  __m256i* at = static_cast<__m256i*>(p);
  _mm256_storeu_si256(at, x.a);
  _mm256_storeu_si256(at + 1, x.b);
}
static inline I load_half_i(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_setzero_si256()};
}
static inline I load_bytes(const uint8_t* p, int64_t n) {
  if (n >= 64) return load_i(p);
  alignas(32) uint8_t copy[64] = {};
  memcpy(copy, p, static_cast<size_t>(n));
  return load_i(copy);
}
static inline I both(__m256i x) { return {x, x}; }
static inline I set1_i(int v) { return both(_mm256_set1_epi32(v)); }
static inline I broadcast_i(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return set1_i(v);
}
static inline I set1_16(int v) { return both(_mm256_set1_epi16(static_cast<int16_t>(v))); }
static inline I and_i(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
static inline I or_i(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
static inline I select_bits(I mask, I x, I y) {
  return or_i(and_i(mask, x), {_mm256_andnot_si256(mask.a, y.a), _mm256_andnot_si256(mask.b, y.b)});
}
static inline I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline I sub_16(I x, I y) {
  return {_mm256_sub_epi16(x.a, y.a), _mm256_sub_epi16(x.b, y.b)};
}
static inline I shift_left_i(I x, int n) {
  return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
}
static inline I shift_left_16(I x, int n) {
  return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)};
}
static inline I shift_right_16(I x, int n) {
  return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)};
}
static inline I widen_bytes(I x) {
  return {_mm256_cvtepu8_epi16(_mm256_castsi256_si128(x.a)),
          _mm256_cvtepu8_epi16(_mm256_extracti128_si256(x.a, 1))};
}

struct WordTable {
  __m256i low, high;  // bytes of the sixteen entries
};
static inline WordTable word_table(const int16_t* entries) {
  uint8_t low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    low[i] = static_cast<uint8_t>(entries[i] & 0xff);
    high[i] = static_cast<uint8_t>((entries[i] >> 8) & 0xff);
  }
  const auto twice = [](const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  };
  return {twice(low), twice(high)};
}
static inline __m256i lookup_words_half(const WordTable& table, __m256i at) {
  // The index of a word in both of its bytes: the low one picks from `low`, the other from `high`.
  const __m256i index = _mm256_and_si256(at, _mm256_set1_epi16(15));
  const __m256i low = _mm256_shuffle_epi8(table.low, index);
  const __m256i high = _mm256_shuffle_epi8(table.high, index);
  return _mm256_blendv_epi8(low, _mm256_slli_epi16(high, 8),
                            _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
}
static inline I lookup_words(const WordTable& table, I at) {
  return {lookup_words_half(table, at.a), lookup_words_half(table, at.b)};
}
using ByteTable = __m256i;
static inline ByteTable byte_table(const uint8_t* entries) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
}
static inline I lookup_bytes(const ByteTable& table, I at) {
  return {_mm256_shuffle_epi8(table, at.a), _mm256_shuffle_epi8(table, at.b)};
}

static inline I dot_words(I sum, I w, I x) {
  return add_i(sum, {_mm256_madd_epi16(w.a, x.a), _mm256_madd_epi16(w.b, x.b)});
}
template <bool kSmall>
static inline __m256i dot_bytes_half(__m256i w, __m256i x) {
  if constexpr (kSmall)  // two products of 15 and 128 fit 16 bits; of 255 and 128 they would not
    return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
  return _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)),
                                            _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8)),
                          _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8)));
}
template <bool kSmall>
static inline I dot_bytes(I sum, I w, I x) {
  return add_i(sum, {dot_bytes_half<kSmall>(w.a, x.a), dot_bytes_half<kSmall>(w.b, x.b)});
}
static inline I dot_words_with(I sum, I w, const void* p) {
  return dot_words(sum, w, broadcast_i(p));
}
template <bool kSmall>
static inline I dot_bytes_with(I sum, I w, const void* p) {
  return dot_bytes<kSmall>(sum, w, broadcast_i(p));
}

// Four rows by eight columns: 4 x 4 inside each 128-bit lane.
static inline void transpose_quad(const __m256i* x, __m256i* t) {
  const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
  const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  t[0] = _mm256_unpacklo_epi64(a, c);
  t[1] = _mm256_unpackhi_epi64(a, c);
  t[2] = _mm256_unpacklo_epi64(b, d);
  t[3] = _mm256_unpackhi_epi64(b, d);
}
template <int kTurned>
[[gnu::always_inline]] static inline void turn_lanes(I* x) {
  __m256i left[kTurned], right[kTurned], t[4];
  for (int i = 0; i < kTurned; ++i) left[i] = x[i].a, right[i] = x[i].b;
  if constexpr (kTurned == 4) {
    transpose_quad(left, t);
    for (int i = 0; i < 4; ++i) x[i].a = t[i];
    transpose_quad(right, t);
    for (int i = 0; i < 4; ++i) x[i].b = t[i];
  } else if constexpr (kTurned == 2) {
    const auto even = [](__m256i a, __m256i b) {
      return _mm256_castps_si256(
          _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
    };
    const auto odd = [](__m256i a, __m256i b) {
      return _mm256_castps_si256(
          _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd));
    };
    x[0] = {even(left[0], left[1]), even(right[0], right[1])};
    x[1] = {odd(left[0], left[1]), odd(right[0], right[1])};
  }
}
static inline void transpose_eight(const __m256i* x, __m256i* t) {
  __m256i low[4], high[4];
  transpose_quad(x, low);
  transpose_quad(x + 4, high);
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(low[i], high[i], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(low[i], high[i], 0x31);
  }
}
[[gnu::always_inline]] static inline void transpose(I* x) {
  __m256i left[16], right[16], t[8];
  for (int i = 0; i < 16; ++i) left[i] = x[i].a, right[i] = x[i].b;
  for (int half = 0; half < 2; ++half) {
    transpose_eight(left + 8 * half, t);
    for (int i = 0; i < 8; ++i) (half ? x[i].b : x[i].a) = t[i];
    transpose_eight(right + 8 * half, t);
    for (int i = 0; i < 8; ++i) (half ? x[8 + i].b : x[8 + i].a) = t[i];
  }
}
static inline F pick(const float* table, const uint8_t* at) {
  const __m256 low = _mm256_set_m128(pick_four(table, at + 4), pick_four(table, at));
  const __m256 high = _mm256_set_m128(pick_four(table, at + 12), pick_four(table, at + 8));
  return {low, high};
}
