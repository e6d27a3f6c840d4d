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
// + 2, + 1: the order of sixteen lanes that walk one span.
constexpr int kParts = 16;

static inline F sum_of_parts(F* part) {
  for (int step = kParts / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) part[i] = add(part[i], part[i + step]);
  }
  return part[0];
}

// take(its place in the block) for each weight of the spans. Four weights of a part follow each
// other, so that sums stay in registers for a while.
template <bool kUnroll, class Begin, class Take, class End>
__attribute__((always_inline)) static inline void for_each_part(int64_t n, const Begin& begin,
                                                                const Take& take, const End& end) {
  constexpr int64_t kAtOnce = 4 * kParts;
  for (int64_t first = 0; first < n; first += kAtOnce) {
    const int64_t last = first + kAtOnce < n ? first + kAtOnce : n;
    for (int part = 0; part < kParts && first + part < last; ++part) {
      begin(part);
      const int64_t at = 16 * (first + part);
      if (kUnroll && last - first == kAtOnce) {
        take(at);
        take(at + 16 * kParts);
        take(at + 32 * kParts);
        take(at + 48 * kParts);
      } else {
        for (int64_t j = at; j < 16 * last; j += 16 * kParts) take(j);
      }
      end(part);
    }
  }
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
  F scales[Count], sum[Count], parts[Count][kParts];
  for (int c = 0; c < Count; ++c) {
    scales[c] = load(scale + 16 * c);
    encoders[c] = encoder;
    // As inverse_of does for positive scales; others are no choices.
    encoders[c].use(div(set1(1.0f), max(scales[c], set1(1e-38f))), load(zero_point + 16 * c));
    for (F& part : parts[c]) part = zero();
  }
  for_each_part<Encoder::kUnroll>(
      n,
      [&](int part) __attribute__((always_inline)) {
        for (int c = 0; c < Count; ++c) sum[c] = parts[c][part];
      },
      [&](int64_t at) __attribute__((always_inline)) {
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
      [&](int part) __attribute__((always_inline)) {
        for (int c = 0; c < Count; ++c) parts[c][part] = sum[c];
      });
  for (int c = 0; c < Count; ++c) {
    const F never = set1(__builtin_inff());
    F error = select_above(scales[c], zero(), sum_of_parts(parts[c]), never);
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
    for (; c + 4 <= count; c += 4) {
      sum_errors<4, kWeighted>(block, importance, n, encoder, scale + 16 * c, zero_point + 16 * c,
                               errors + 16 * c);
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
  F sum[kSums], parts[kSums][kParts];
  for (auto& of_sum : parts) {
    for (F& part : of_sum) part = zero();
  }
  for_each_part<Encoder::kUnroll>(
      n,
      [&](int part) __attribute__((always_inline)) {
        for (int s = 0; s < kSums; ++s) sum[s] = parts[s][part];
      },
      [&](int64_t at) __attribute__((always_inline)) {
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
      [&](int part) __attribute__((always_inline)) {
        for (int s = 0; s < kSums; ++s) parts[s][part] = sum[s];
      });
  float* const to[] = {fits->error, fits->wd, fits->dd, fits->w, fits->d};
  for (int s = 0; s < kSums; ++s) store(to[s], sum_of_parts(parts[s]));
}

template <bool kWeighted>
static void fit_as(const Encoding& encoding, const float* block, const float* importance, int64_t n,
                   const float* scale, const float* zero_point, SpanFits* fits) {
  float inverse[16];
  for (int lane = 0; lane < 16; ++lane) inverse[lane] = inverse_of(scale[lane]);
  const F inverses = load(inverse), scales = load(scale);
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
