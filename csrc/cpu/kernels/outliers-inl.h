// Products of the sparse values of one row of a weight. Included by each target.

// Values of a row that are floats at any moment, and rows of x that are summed at once, in V
// vectors.
constexpr int64_t kOutlierChunk = 256;
constexpr int kOutlierVectors = 4;
constexpr int64_t kOutliersAhead = 6;  // x is asked for this many outliers early

// y[0] += sum of value * x[column]; four sums, so that an addition need not wait for the last one.
// Columns beyond the weight read x[0] and add nothing.
template <class Column>
static inline void add_outliers_to_one(const float* value, const Column* column, int64_t n,
                                       uint32_t cols, const float* x, float* y) {
  float sum[4] = {};
  const auto add = [&](int64_t j, float* to) {
    const uint32_t at = static_cast<uint32_t>(column[j]);
    *to += at < cols ? value[j] * x[at] : 0.0f;
  };
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    add(j, &sum[0]);
    add(j + 1, &sum[1]);
    add(j + 2, &sum[2]);
    add(j + 3, &sum[3]);
  }
  for (; j < n; ++j) add(j, &sum[0]);
  *y += (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// y[i * ldy] += the same of x[column * ldx + i] for i < m <= 16 * V.
template <int V, class Column>
static inline void add_outliers_to_rows(const float* value, const Column* column, int64_t n,
                                        uint32_t cols, const float* x, int64_t ldx, int64_t m,
                                        float* y, int64_t ldy) {
  F sum[V];
  for (int v = 0; v < V; ++v) sum[v] = zero();
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t at = static_cast<uint32_t>(column[j]);
    if (j + kOutliersAhead < n) {
      const uint32_t ahead = static_cast<uint32_t>(column[j + kOutliersAhead]);
      if (ahead < cols)
        for (int v = 0; v < V; ++v) prefetch(x + int64_t{ahead} * ldx + 16 * v);
    }
    if (at >= cols) continue;
    const F factor = set1(value[j]);
    for (int v = 0; v < V; ++v) sum[v] = fma(factor, load(x + int64_t{at} * ldx + 16 * v), sum[v]);
  }
  float sums[16 * V];
  for (int v = 0; v < V; ++v) store(sums + 16 * v, sum[v]);
  for (int64_t i = 0; i < m; ++i) y[i * ldy] += sums[i];
}

template <class Column>
static inline void add_outliers_of(const OutlierView& w, int64_t begin, int64_t end, uint32_t cols,
                                   const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy) {
  const Column* column = static_cast<const Column*>(w.column) + begin;
  const F factor = set1(w.factor);
  float value[kOutlierChunk];
  for (int64_t n; begin < end; begin += n, column += n) {
    n = end - begin < kOutlierChunk ? end - begin : kOutlierChunk;
    for (int64_t j = 0; j < n; j += 16)
      store(value + j,
            mul(halves_at(w.value + begin + j, static_cast<int>(n - j < 16 ? n - j : 16)), factor));
    if (ldx == 1) {
      add_outliers_to_one(value, column, n, cols, x, y);
      continue;
    }
    int64_t i = 0;
    for (; i + 16 < m; i += 16 * kOutlierVectors) {
      const int64_t rows = m - i < 16 * kOutlierVectors ? m - i : 16 * kOutlierVectors;
      add_outliers_to_rows<kOutlierVectors>(value, column, n, cols, x + i, ldx, rows, y + i * ldy,
                                            ldy);
    }
    if (i < m) add_outliers_to_rows<1>(value, column, n, cols, x + i, ldx, m - i, y + i * ldy, ldy);
  }
}

static void add_outliers(const OutlierView& w, int64_t begin, int64_t end, int64_t cols,
                         const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy) {
  const uint32_t limit = static_cast<uint32_t>(cols);
  w.wide ? add_outliers_of<int32_t>(w, begin, end, limit, x, ldx, m, y, ldy)
         : add_outliers_of<uint16_t>(w, begin, end, limit, x, ldx, m, y, ldy);
}
