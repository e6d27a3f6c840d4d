// Choosing codes: statistics of a span, the error of a scale on it, and the codes for a scale.
// Included by each target.

static SpanStats stats(const float* w, int64_t n) {
  F low = set1(w[0]), high = low, sum = zero(), poison = zero();
  const F nothing = zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F v = load(w + i);
    low = min(v, low);
    high = max(v, high);
    sum = add(sum, v);
    poison = add(poison, mul(v, nothing));  // NaN and infinity times zero are NaN, and stay
  }
  if (i < n) {
    const F v = load_part(w + i, static_cast<int>(n - i));  // absent lanes read as zero
    float lane[16];
    store(lane, v);
    for (int64_t j = n - i; j < 16; ++j) lane[j] = w[0];
    const F filled = load(lane);
    low = min(filled, low);
    high = max(filled, high);
    sum = add(sum, v);
    poison = add(poison, mul(v, nothing));
  }
  float lows[16], highs[16];
  store(lows, low);
  store(highs, high);
  SpanStats result{lows[0], highs[0], reduce_add(sum), reduce_add(poison) == 0.0f};
  for (int j = 1; j < 16; ++j) {
    result.min = lows[j] < result.min ? lows[j] : result.min;
    result.max = highs[j] > result.max ? highs[j] : result.max;
  }
  return result;
}

// Integer grid: clamp(round(w / scale + zero), 0, top), still as floats.
struct GridEncoder {
  F inverse, zero_point, top;
  explicit GridEncoder(const Grid& grid)
      : inverse(set1(inverse_of(grid.scale))), zero_point(set1(grid.zero)), top(set1(grid.top)) {}
  F code(F w) const { return min(max(round_even(add(mul(w, inverse), zero_point)), zero()), top); }
  F unit(F w) const { return sub(code(w), zero_point); }
};

// Codebook: the rank of w / scale among the pivots.
struct CodebookEncoder {
  F inverse;
  F pivots[kMaxLevels];
  int pivot_count;
  float level_of_rank[kMaxLevels];
  float code_of_rank[kMaxLevels];
  CodebookEncoder(float scale, const Codebook& book)
      : inverse(set1(inverse_of(scale))), pivot_count(book.pivot_count) {
    for (int i = 0; i < kMaxLevels; ++i) {
      const bool used = i <= book.pivot_count;
      pivots[i] = set1(i < book.pivot_count ? book.pivots[i] : 0.0f);
      level_of_rank[i] = used ? book.levels[book.code_of_rank[i]] : 0.0f;
      code_of_rank[i] = used ? static_cast<float>(book.code_of_rank[i]) : 0.0f;
    }
  }
  I rank(F w) const {
    const F scaled = mul(w, inverse);
    I r = zero_i();
    for (int p = 0; p < pivot_count; ++p) r = count_above(r, scaled, pivots[p]);
    return r;
  }
  F code(F w) const { return lookup(load(code_of_rank), rank(w)); }
  F unit(F w) const { return lookup(load(level_of_rank), rank(w)); }
};

// take(values, unit decode) for each vector of the span; absent lanes of the last one are zero in
// both, so that they do not count (a mid-rise grid has no zero of its own).
template <class Encoder, class Take>
static inline void for_each_vector(const float* w, int64_t n, const Encoder& encoder,
                                   const Take& take) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F v = load(w + i);
    take(v, encoder.unit(v));
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    const F v = load_part(w + i, rest);
    float d[16];
    store(d, encoder.unit(v));
    take(v, load_part(d, rest));
  }
}

template <class Encoder>
static inline float error(const float* w, int64_t n, float scale, const Encoder& encoder) {
  const F s = set1(scale);
  F sum = zero();
  for_each_vector(w, n, encoder, [&](F v, F d) {
    const F off = sub(v, mul(d, s));
    sum = add(sum, mul(off, off));
  });
  return reduce_add(sum);
}

template <class Encoder>
static inline SpanFit fit(const float* w, int64_t n, const Encoder& encoder) {
  F wd = zero(), dd = zero(), sum = zero();
  for_each_vector(w, n, encoder, [&](F v, F d) {
    wd = add(wd, mul(v, d));
    dd = add(dd, mul(d, d));
    sum = add(sum, d);
  });
  return {reduce_add(wd), reduce_add(dd), reduce_add(sum)};
}

template <class Encoder>
static inline void encode(const float* w, int64_t n, const Encoder& encoder, uint8_t* codes) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_bytes(codes + i, to_int(encoder.code(load(w + i))));
  if (i < n) {
    uint8_t tail[16];
    store_bytes(tail, to_int(encoder.code(load_part(w + i, static_cast<int>(n - i)))));
    memcpy(codes + i, tail, static_cast<size_t>(n - i));
  }
}

static float error_grid(const float* w, int64_t n, const Grid& grid) {
  return error(w, n, grid.scale, GridEncoder(grid));
}
static float error_codebook(const float* w, int64_t n, float scale, const Codebook& book) {
  return error(w, n, scale, CodebookEncoder(scale, book));
}
static SpanFit fit_grid(const float* w, int64_t n, const Grid& grid) {
  return fit(w, n, GridEncoder(grid));
}
static SpanFit fit_codebook(const float* w, int64_t n, float scale, const Codebook& book) {
  return fit(w, n, CodebookEncoder(scale, book));
}
static void encode_grid(const float* w, int64_t n, const Grid& grid, uint8_t* codes) {
  encode(w, n, GridEncoder(grid), codes);
}
static void encode_codebook(const float* w, int64_t n, float scale, const Codebook& book,
                            uint8_t* codes) {
  encode(w, n, CodebookEncoder(scale, book), codes);
}
