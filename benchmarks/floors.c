// What the machine can do at most: how fast memory is read, and how many multiply-adds a core
// issues from registers. Compiled when a benchmark starts, for this CPU (floors.py). Each loop runs
// on the calling thread.
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
  kChains = 12
};  // independent accumulators: more than the latency of any multiply-add times its rate

typedef uint64_t Line __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

// Reads `lines` lines of 64 bytes at `from` into eight accumulators, one stream.
uint64_t read_1(const Line* from, size_t lines) {
  Line sum[8] = {{0}};
  for (size_t i = 0; i + 8 <= lines; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += from[i + j];
  for (int j = 1; j < 8; ++j) sum[0] += sum[j];
  return sum[0][0] + sum[0][7];
}

// The same in four streams, a quarter of the lines apart: the prefetcher has more to fetch ahead.
uint64_t read_4(const Line* from, size_t lines) {
  Line sum[8] = {{0}};
  const size_t quarter = lines / 4;
  for (size_t i = 0; i + 2 <= quarter; i += 2)
    for (int j = 0; j < 8; ++j) sum[j] += from[j / 2 * quarter + i + j % 2];
  for (int j = 1; j < 8; ++j) sum[0] += sum[j];
  return sum[0][0] + sum[0][7];
}

// Each loop below returns the multiply-adds of one step; `seed` starts the chains apart, so that
// none can be shared, and `sink` keeps them. A step is kChains instructions.

int fp32_steps(size_t steps, const float* seed, float* sink) {
  Floats a[kChains], b = {0}, c = {0};
  for (int j = 0; j < kChains; ++j) a[j] = *seed + (float)j + (Floats){0};
  b += 0.5f * *seed, c += *seed;
  for (size_t i = 0; i < steps; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) a[j] = a[j] * b + c;
  for (int j = 1; j < kChains; ++j) a[0] += a[j];
  *sink = a[0][0];
  return 16 * kChains;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
typedef __m512i Ints;
#define SET1(x) _mm512_set1_epi32(x)
#define LANES 16
#elif defined(__AVX2__)
typedef __m256i Ints;
#define SET1(x) _mm256_set1_epi32(x)
#define LANES 8
#endif

// One step of a chain for int16 (two products a lane) and int8 (four a lane).
#if defined(__AVX512VNNI__)
#define INT16_STEP(acc, x) _mm512_dpwssd_epi32(acc, x, x)
#define INT8_STEP(acc, x) _mm512_dpbusd_epi32(acc, x, x)
#elif defined(LANES) && LANES == 16
#define INT16_STEP(acc, x) _mm512_add_epi32(acc, _mm512_madd_epi16(acc, x))
#define INT8_STEP(acc, x) _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(acc, x), x))
#elif defined(LANES)
#define INT16_STEP(acc, x) _mm256_add_epi32(acc, _mm256_madd_epi16(acc, x))
#define INT8_STEP(acc, x) _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(acc, x), x))
#endif

// The empty statement hides from the compiler what a chain holds: it would replace equal steps by
// one product.
#define INT_LOOP(name, STEP, per_lane)                             \
  int name(size_t steps, const int* seed, int* sink) {             \
    Ints a[kChains], x = SET1(*seed);                              \
    for (int j = 0; j < kChains; ++j) a[j] = SET1(j);              \
    for (size_t i = 0; i < steps; ++i) {                           \
      _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) { \
        Ints next = STEP(a[j], x);                                 \
        __asm__ volatile("" : "+x"(next));                         \
        a[j] = next;                                               \
      }                                                            \
    }                                                              \
    for (int j = 1; j < kChains; ++j) a[0] += a[j];                \
    *sink = (int)a[0][0];                                          \
    return per_lane * LANES * kChains;                             \
  }

#if defined(LANES)
INT_LOOP(int16_steps, INT16_STEP, 2)
INT_LOOP(int8_steps, INT8_STEP, 4)
#endif

#if defined(__AVX512BF16__)
int bf16_steps(size_t steps, const float* seed, float* sink) {
  __m512 a[kChains];
  const __m512bh x = (__m512bh)_mm512_set1_epi32((int)*seed);
  for (int j = 0; j < kChains; ++j) a[j] = _mm512_set1_ps(*seed + (float)j);
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) a[j] = _mm512_dpbf16_ps(a[j], x, x);
  }
  for (int j = 1; j < kChains; ++j) a[0] = _mm512_add_ps(a[0], a[j]);
  *sink = _mm512_cvtss_f32(a[0]);
  return 32 * kChains;
}
#endif
