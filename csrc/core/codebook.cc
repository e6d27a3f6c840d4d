#include "core/codebook.h"

#include <algorithm>
#include <cmath>

namespace bitfold {
namespace {

// The lowest rank that the first `steps` decisions of a path leave possible.
int rank_of_path(int path, int steps, int all_steps) {
  int rank = 0;
  for (int k = 0; k < steps; ++k) rank |= (path >> k & 1) << (all_steps - 1 - k);
  return rank;
}

void plant_tree(Codebook* book) {
  int steps = 0;
  while (1 << steps < book->count) ++steps;
  for (int k = 0; k < kMaxSteps; ++k) {
    for (int path = 0; path < kMaxLevels; ++path) book->pivot_of_path[k][path] = INFINITY;
    for (int path = 0; k < steps && path < 1 << k; ++path) {
      const int pivot = rank_of_path(path, k, steps) + (1 << (steps - 1 - k)) - 1;
      if (pivot < book->pivot_count) book->pivot_of_path[k][path] = book->pivots[pivot];
    }
  }
  for (int path = 0; path < 1 << steps; ++path) {
    const int rank = rank_of_path(path, steps, steps);
    if (rank > book->pivot_count) continue;
    book->code_of_path[path] = book->code_of_rank[rank];
    book->level_of_path[path] = book->levels[book->code_of_rank[rank]];
  }
}

// Sorts distinct levels and separates neighbours at their midpoint, computed in float32 as
// bitsandbytes computes it.
Codebook from_levels(const float* levels, int count) {
  Codebook book{};
  book.count = count;
  int ranks = 0;
  for (int code = 0; code < count; ++code) {
    book.levels[code] = levels[code];
    bool seen = false;
    for (int i = 0; i < code; ++i) seen = seen || levels[i] == levels[code];
    if (!seen) book.code_of_rank[ranks++] = static_cast<unsigned char>(code);
  }
  std::sort(book.code_of_rank, book.code_of_rank + ranks,
            [&](int a, int b) { return levels[a] < levels[b]; });
  book.pivot_count = ranks - 1;
  for (int i = 0; i + 1 < ranks; ++i) {
    // Halved first, or the sum of learned levels beyond 1.7e38 would overflow; the same bits
    // otherwise.
    book.pivots[i] = levels[book.code_of_rank[i]] / 2 + levels[book.code_of_rank[i + 1]] / 2;
  }
  plant_tree(&book);
  return book;
}

template <int N>
Codebook from_levels(const float (&levels)[N]) {
  return from_levels(levels, N);
}

// Quantiles of the normal distribution, Dettmers et al. 2305.14314 (nf4); the same construction at
// 3 and 2 bits.
constexpr float kNf4Levels[] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
constexpr float kNf3Levels[] = {-1.0f,        -0.478629172f, -0.217141822f, 0.0f,
                                0.160930172f, 0.337915182f,  0.562616944f,  1.0f};
constexpr float kNf2Levels[] = {-1.0f, 0.0f, 0.337915182f, 1.0f};

// Half-octaves: 0 and +-2^(-k/2). Seven negative, zero, eight positive; zero keeps pruned weights
// exactly zero.
constexpr float kLog4Levels[] = {
    -1.0f,  -0.70710678f, -0.5f, -0.35355339f, -0.25f, -0.17677670f, -0.125f, 0.0f, 0.08838835f,
    0.125f, 0.17677670f,  0.25f, 0.35355339f,  0.5f,   0.70710678f,  1.0f};

// bitsandbytes' fp4: sign, 2 bits of exponent, 1 of significand, scaled to 1; not in order of
// magnitude, and code 8 is a second zero that is read but never written.
constexpr float kFp4Levels[] = {
    0.0f, 0.0052083333f,  0.6666667f,  1.0f,  0.33333333f,  0.5f,  0.16666667f,  0.25f,
    0.0f, -0.0052083333f, -0.6666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f};

}  // namespace

const Codebook kNf4 = from_levels(kNf4Levels);
const Codebook kNf3 = from_levels(kNf3Levels);
const Codebook kNf2 = from_levels(kNf2Levels);
const Codebook kLog4 = from_levels(kLog4Levels);
const Codebook kFp4 = from_levels(kFp4Levels);

Codebook sorted_codebook(const float* levels, int count) { return from_levels(levels, count); }

}  // namespace bitfold
