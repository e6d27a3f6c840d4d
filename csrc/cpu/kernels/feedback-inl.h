// Rounding with error feedback (cpu/kernel_table.h), sixteen rows at once, one to a lane. Products
// and sums are rounded one by one, so that codes are the same bits on every instruction set.
// Included by each target, after quantize-inl.h.

// Code (as a float) and unit decode of a scaled weight.
template <int Bits>
static inline void round_to(const GridEncoder<Bits>& encoder, F v, F* unit, F* code) {
  *code = encoder.level(v);
  *unit = sub(*code, encoder.zero_point);
}
template <int Bits>
static inline void round_to(const CodebookEncoder<Bits>& encoder, F v, F* unit, F* code) {
  const I path = encoder.path(v);
  *unit = lookup(encoder.levels, path);
  *code = to_float(lookup_int(encoder.codes, path));
}

// Learned codebooks: every lane has its own.
struct LaneBooks {
  const float *pivots, *levels, *codes;
  int count;
  void use(F /*inverse_scale*/, F /*zero_point*/) {}
};
static inline void round_to(const LaneBooks& books, F v, F* unit, F* code) {
  *unit = load(books.levels);
  *code = load(books.codes);
  for (int rank = 1; rank < books.count; ++rank) {
    const F pivot = load(books.pivots + 16 * (rank - 1));
    *unit = select_above(v, pivot, load(books.levels + 16 * rank), *unit);
    *code = select_above(v, pivot, load(books.codes + 16 * rank), *code);
  }
}

// So many columns pass on their changes at once: what they add to is loaded and stored once.
constexpr int64_t kTogether = 8;

// c of the columns [from, count) grows by the changes of the kTogether columns whose rows of the
// matrix begin at `rows`, in their order.
static inline void pass_on(const F* change, const float* rows, int64_t count, int64_t from,
                           float* corrections) {
  for (int64_t j = from; j < count; ++j) {
    F c = load(corrections + 16 * j);
    for (int64_t i = 0; i < kTogether; ++i) c = add(c, mul(change[i], set1(rows[i * count + j])));
    store(corrections + 16 * j, c);
  }
}

template <bool kAgain, class Encoder>
static inline void feed_back_with(const FeedbackColumns& columns, const FeedbackPanel& panel,
                                  Encoder encoder) {
  float corrections[16 * kFeedbackColumns];
  for (int64_t k = 0; k < columns.count; ++k) {
    // Lines far apart, in an order that no hardware foresees: those of this panel's weights and
    // codes, and what lies beside its corrections and errors, the next panel's.
    const int64_t at = 16 * static_cast<int64_t>(columns.column[k]);
    __builtin_prefetch(panel.weights + at);
    __builtin_prefetch(panel.codes + at, 1);
    __builtin_prefetch(panel.error + k * panel.stride, 1);
    if (panel.correction) __builtin_prefetch(panel.correction + k * panel.stride + 16);
    F c = zero();
    if (panel.correction)
      c = mul(load(panel.correction + k * panel.stride), set1(columns.factor[k]));
    if (kAgain) c = sub(c, load(panel.error + k * panel.stride));
    store(corrections + 16 * k, c);
  }
  F cost = load(panel.cost), changes[kTogether];
  for (int64_t k = 0; k < columns.count; ++k) {
    const int64_t at = 16 * static_cast<int64_t>(columns.column[k]);
    const int64_t group = 16 * static_cast<int64_t>(columns.group[k]);
    const F w = load(panel.weights + at), c = load(corrections + 16 * k);
    const F scale = load(panel.scale + group);
    encoder.use(inverses_of(scale), load(panel.zero + group));
    F unit, code;
    round_to(encoder, add(w, c), &unit, &code);
    F error = sub(w, mul(unit, scale));
    if (panel.exact) {
      error = select_above(to_float(unpack8(panel.exact + at)), zero(), zero(), error);
    }
    F off = add(c, error), change = error;
    F square = mul(off, off);
    float* const stored = panel.error + k * panel.stride;
    if constexpr (kAgain) {
      const F old = load(stored), off_of_old = add(c, old);
      const F worse = abs(off_of_old), now = abs(off);
      error = select_above(worse, now, error, old);
      code = select_above(worse, now, code, to_float(unpack8(panel.codes + at)));
      off = select_above(worse, now, off, off_of_old);
      square = sub(mul(off, off), mul(off_of_old, off_of_old));
      change = sub(error, old);
      store(panel.change + k * panel.stride, change);
    }
    store(stored, error);
    pack8(panel.codes + at, to_int(code));
    cost = add(cost, mul(set1(columns.cost[k]), square));
    if (!columns.matrix) continue;
    const int64_t together = k % kTogether, first = k - together;
    const int64_t end = first + kTogether < columns.count ? first + kTogether : columns.count;
    changes[together] = change;
    const float* row = columns.matrix + k * columns.count;
    for (int64_t j = k + 1; j < end; ++j) {
      float* to = corrections + 16 * j;
      store(to, add(load(to), mul(change, set1(row[j]))));
    }
    if (together == kTogether - 1) {
      pass_on(changes, columns.matrix + first * columns.count, columns.count, end, corrections);
    }
  }
  store(panel.cost, cost);
}

static void feed_back(const Encoding& encoding, const FeedbackColumns& columns,
                      const FeedbackPanel& panel) {
  const auto job = [&](const auto& encoder) {
    panel.change ? feed_back_with<true>(columns, panel, encoder)
                 : feed_back_with<false>(columns, panel, encoder);
  };
  if (!panel.books) return with_encoder(encoding, job);
  job(LaneBooks{panel.books, panel.books + 256, panel.books + 512, 1 << encoding.bits});
}
