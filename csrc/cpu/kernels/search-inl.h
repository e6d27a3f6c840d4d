// What a choice of scale leaves of a span: squared errors and least-squares sums. Included by each
// target, after quantize-inl.h.

// take(values, mask) for each vector of a span; mask(x) clears the lanes beyond its end, so that
// they do not count (a mid-rise grid has no zero of its own).
template <class Take>
static inline void for_each_vector(const float* w, int64_t n, const Take& take) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) take(load(w + i), [](F x) { return x; });
  if (i == n) return;
  const int rest = static_cast<int>(n - i);
  take(load_part(w + i, rest), [rest](F x) {
    float lane[16];
    store(lane, x);
    return load_part(lane, rest);
  });
}

// Several choices in one walk over the span: a weight is loaded once, and the sums of different
// choices do not wait for each other.
template <int Count, class Encoder>
static inline void sum_errors(const float* w, int64_t n, const Encoder& encoder, const float* scale,
                              const float* inverse, const float* zero_point, float* errors) {
  Encoder encoders[Count];
  F scales[Count], sum[Count];
  for (int c = 0; c < Count; ++c) {
    encoders[c] = encoder;
    encoders[c].use(set1(inverse[c]), set1(zero_point[c]));
    scales[c] = set1(scale[c]);
    sum[c] = zero();
  }
  for_each_vector(w, n, [&](F v, const auto& mask) {
    for (int c = 0; c < Count; ++c) {
      const F off = sub(v, mul(mask(encoders[c].unit(v)), scales[c]));
      sum[c] = add(sum[c], mul(off, off));
    }
  });
  if constexpr (Count == 4) {
    reduce_add4(sum[0], sum[1], sum[2], sum[3], errors);
  } else {
    for (int c = 0; c < Count; ++c) errors[c] = reduce_add(sum[c]);
  }
}

constexpr float kFarthestZero = 2048.0f;  // where fp16 ceases to resolve whole codes

static void errors(const Encoding& encoding, const float* w, int64_t n, int64_t count,
                   const float* scale, const float* zero_point, float* errors) {
  float inverse[kMaxChoices];
  for (int64_t i = 0; i < count; i += 16) {
    const int lanes = static_cast<int>(count - i < 16 ? count - i : 16);
    // As inverse_of does for positive scales; others are no choices.
    store_part(inverse + i, div(set1(1.0f), max(load_part(scale + i, lanes), set1(1e-38f))), lanes);
  }
  with_encoder(encoding, [&](const auto& encoder) {
    int64_t c = 0;
    for (; c + 4 <= count; c += 4)
      sum_errors<4>(w, n, encoder, scale + c, inverse + c, zero_point + c, errors + c);
    for (; c < count; ++c)
      sum_errors<1>(w, n, encoder, scale + c, inverse + c, zero_point + c, errors + c);
  });
  for (int64_t i = 0; i < count; i += 16) {
    const int lanes = static_cast<int>(count - i < 16 ? count - i : 16);
    const F s = load_part(scale + i, lanes), z = load_part(zero_point + i, lanes);
    const F never = set1(__builtin_inff());
    F e = load_part(errors + i, lanes);
    e = select_above(s, zero(), e, never);
    e = select_above(s, set1(kLargestFloat), never, e);
    e = select_above(abs(z), set1(kFarthestZero), never, e);
    store_part(errors + i, e, lanes);
  }
}

template <bool kMoments, class Encoder>
static inline SpanFit fit_with(const float* w, int64_t n, float scale, const Encoder& encoder) {
  const F s = set1(scale);
  F error = zero(), wd = zero(), dd = zero(), sum_w = zero(), sum_d = zero();
  for_each_vector(w, n, [&](F v, const auto& mask) {
    const F d = mask(encoder.unit(v));
    const F off = sub(v, mul(d, s));
    error = add(error, mul(off, off));
    wd = add(wd, mul(v, d));
    dd = add(dd, mul(d, d));
    if constexpr (kMoments) {
      sum_w = add(sum_w, v);
      sum_d = add(sum_d, d);
    }
  });
  float sums[4];
  reduce_add4(error, wd, dd, sum_w, sums);
  return {sums[0], sums[1], sums[2], sums[3], kMoments ? reduce_add(sum_d) : 0.0f};
}

static SpanFit fit(const Encoding& encoding, const float* w, int64_t n, ScaleChoice choice) {
  const F inverse = set1(inverse_of(choice.scale)), zero_point = set1(choice.zero);
  SpanFit result{};
  with_encoder(encoding, [&](auto encoder) {
    encoder.use(inverse, zero_point);
    result = encoding.zero == Zero::kFloat ? fit_with<true>(w, n, choice.scale, encoder)
                                           : fit_with<false>(w, n, choice.scale, encoder);
  });
  return result;
}
