// What a choice of scale leaves of a span: squared errors and least-squares sums, of sixteen spans
// at once, one to a lane, so that nothing is ever added across lanes. Included by each target,
// after quantize-inl.h.

static void interleave(const float* const* spans, int64_t n, float* block) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    for (int lane = 0; lane < 16; lane += 4) transpose4(spans + lane, j, block + 16 * j + lane);
  }
  for (; j < n; ++j) {
    for (int lane = 0; lane < 16; ++lane) block[16 * j + lane] = spans[lane][j];
  }
}

// Weight j of a span belongs to partial sum j mod 16, and these are added i with i + 8, then + 4,
// + 2, + 1: the order of sixteen lanes that walk one span. The four that meet first are taken in
// one walk, which keeps them in registers; four walks through a piece of the first cache see all.
// take(place in the block, sums) adds a weight to `Sums` sums; total [Sums].
template <int Sums, class Take>
[[gnu::always_inline]] static inline void sum_by_parts(int64_t n, const Take& take, F* total) {
  constexpr int kTogether = 4;
  constexpr int64_t kPiece = 256;
  F parts[4][kTogether][Sums], quarter[4][Sums];
  for (int64_t first = 0; first < n; first += kPiece) {
    const bool ends = first + kPiece >= n;
    const int64_t last = ends ? n : first + kPiece;
    for (int q = 0; q < 4; ++q) {
      F sum[kTogether][Sums];
      for (int i = 0; i < kTogether; ++i) {
        for (int s = 0; s < Sums; ++s) sum[i][s] = first ? parts[q][i][s] : zero();
      }
      int64_t j = first + q;
      for (; j + 12 < last; j += 16) {
        for (int i = 0; i < kTogether; ++i) take(16 * (j + 4 * i), sum[i]);
      }
      for (int i = 0; i < kTogether; ++i) {
        if (j + 4 * i < last) take(16 * (j + 4 * i), sum[i]);
      }
      if (ends) {
        for (int s = 0; s < Sums; ++s)
          quarter[q][s] = add(add(sum[0][s], sum[2][s]), add(sum[1][s], sum[3][s]));
      } else {
        for (int i = 0; i < kTogether; ++i) {
          for (int s = 0; s < Sums; ++s) parts[q][i][s] = sum[i][s];
        }
      }
    }
  }
  for (int s = 0; s < Sums; ++s)
    total[s] = add(add(quarter[0][s], quarter[2][s]), add(quarter[1][s], quarter[3][s]));
}

constexpr float kFarthestZero = 2048.0f;  // where fp16 ceases to resolve whole codes

// Several choices in one walk: a weight is loaded once, and the sums of different choices do not
// wait for each other.
// kWeighted: each square is multiplied by the number in the same place of `importance`.
template <int Count, bool kWeighted, class Encoder>
static inline void sum_errors(const float* block, const float* importance, int64_t n,
                              const Encoder& encoder, const float* scale, const float* zero_point,
                              float* errors) {
  Encoder encoders[Count];
  F scales[Count], total[Count];
  for (int c = 0; c < Count; ++c) {
    scales[c] = load(scale + 16 * c);
    encoders[c] = encoder;
    // As inverse_of does for positive scales; others are no choices.
    encoders[c].use(div(set1(1.0f), max(scales[c], set1(1e-38f))), load(zero_point + 16 * c));
  }
  sum_by_parts<Count>(
      n,
      [&](int64_t at, F * sum) __attribute__((always_inline)) {
        const F v = load(block + at);
        for (int c = 0; c < Count; ++c) {
          const F off = sub(v, mul(encoders[c].unit(v), scales[c]));
          if constexpr (kWeighted) {
            sum[c] = add(sum[c], mul(mul(off, off), load(importance + at)));
          } else {
            sum[c] = add(sum[c], mul(off, off));
          }
        }
      },
      total);
  for (int c = 0; c < Count; ++c) {
    const F never = set1(__builtin_inff());
    F error = select_above(scales[c], zero(), total[c], never);
    error = select_above(scales[c], set1(kLargestFloat), never, error);
    error = select_above(abs(load(zero_point + 16 * c)), set1(kFarthestZero), never, error);
    store(errors + 16 * c, error);
  }
}

template <bool kWeighted>
static void all_errors(const Encoding& encoding, const float* block, const float* importance,
                       int64_t n, int64_t count, const float* scale, const float* zero_point,
                       float* errors) {
  with_encoder(encoding, [&](const auto& encoder) {
    int64_t c = 0;
    constexpr int kTogether = kSumsInRegisters / 4;
    for (; c + kTogether <= count; c += kTogether) {
      sum_errors<kTogether, kWeighted>(block, importance, n, encoder, scale + 16 * c,
                                       zero_point + 16 * c, errors + 16 * c);
    }
    for (; c < count; ++c) {
      sum_errors<1, kWeighted>(block, importance, n, encoder, scale + 16 * c, zero_point + 16 * c,
                               errors + 16 * c);
    }
  });
}

static void errors(const Encoding& encoding, const float* block, int64_t n, int64_t count,
                   const float* scale, const float* zero_point, float* errors) {
  all_errors<false>(encoding, block, nullptr, n, count, scale, zero_point, errors);
}

static void weighted_errors(const Encoding& encoding, const float* block, const float* importance,
                            int64_t n, int64_t count, const float* scale, const float* zero_point,
                            float* errors) {
  all_errors<true>(encoding, block, importance, n, count, scale, zero_point, errors);
}

template <bool kMoments, bool kWeighted, class Encoder>
static inline void fit_with(const float* block, const float* importance, int64_t n, F scale,
                            const Encoder& encoder, SpanFits* fits) {
  constexpr int kSums = kMoments ? 5 : 3;
  F total[kSums];
  sum_by_parts<kSums>(
      n,
      [&](int64_t at, F * sum) __attribute__((always_inline)) {
        const F v = load(block + at);
        const F d = encoder.unit(v);
        const F off = sub(v, mul(d, scale));
        F of_v = v, of_d = d, of_off = off;
        if constexpr (kWeighted) {
          const F h = load(importance + at);
          of_v = mul(v, h);
          of_d = mul(d, h);
          of_off = mul(off, h);
        }
        sum[0] = add(sum[0], mul(off, of_off));
        sum[1] = add(sum[1], mul(v, of_d));
        sum[2] = add(sum[2], mul(d, of_d));
        if constexpr (kMoments) {
          sum[3] = add(sum[3], of_v);
          sum[4] = add(sum[4], of_d);
        }
      },
      total);
  float* const to[] = {fits->error, fits->wd, fits->dd, fits->w, fits->d};
  for (int s = 0; s < kSums; ++s) store(to[s], total[s]);
}

template <bool kWeighted>
static void fit_as(const Encoding& encoding, const float* block, const float* importance, int64_t n,
                   const float* scale, const float* zero_point, SpanFits* fits) {
  const F scales = load(scale), inverses = inverses_of(scales);
  with_encoder(encoding, [&](auto encoder) {
    encoder.use(inverses, load(zero_point));
    encoding.zero == Zero::kFloat
        ? fit_with<true, kWeighted>(block, importance, n, scales, encoder, fits)
        : fit_with<false, kWeighted>(block, importance, n, scales, encoder, fits);
  });
}

static void fit(const Encoding& encoding, const float* block, int64_t n, const float* scale,
                const float* zero_point, SpanFits* fits) {
  fit_as<false>(encoding, block, nullptr, n, scale, zero_point, fits);
}

static void weighted_fit(const Encoding& encoding, const float* block, const float* importance,
                         int64_t n, const float* scale, const float* zero_point, SpanFits* fits) {
  fit_as<true>(encoding, block, importance, n, scale, zero_point, fits);
}
