// Products of float activations with a decoded tile of weights that sits in cache. Included by each
// target.

// y[i, j] += dot(x[i], w[j]) for i < M, j < N. Both operands lie along k, so nothing needs packing;
// M * N accumulators hide the latency of the multiply-adds.
template <int M, int N>
static inline void dot_tile(const float* x, int64_t ldx, const float* w, int64_t ldw, float* y,
                            int64_t ldy, int64_t k) {
  F sum[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sum[i][j] = zero();
  const auto step = [&](const F* xs, const F* ws) {
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) sum[i][j] = fma(xs[i], ws[j], sum[i][j]);
  };
  F xs[M], ws[N];
  int64_t p = 0;
  for (; p + 16 <= k; p += 16) {
    for (int i = 0; i < M; ++i) xs[i] = load(x + i * ldx + p);
    for (int j = 0; j < N; ++j) ws[j] = load(w + j * ldw + p);
    step(xs, ws);
  }
  if (p < k) {
    const int rest = static_cast<int>(k - p);
    for (int i = 0; i < M; ++i) xs[i] = load_part(x + i * ldx + p, rest);
    for (int j = 0; j < N; ++j) ws[j] = load_part(w + j * ldw + p, rest);
    step(xs, ws);
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) y[i * ldy + j] += reduce_add(sum[i][j]);
}

template <int M>
static inline void dot_rows(const float* x, int64_t ldx, const float* w, int64_t ldw, float* y,
                            int64_t ldy, int64_t n, int64_t k) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) dot_tile<M, 4>(x, ldx, w + j * ldw, ldw, y + j, ldy, k);
  for (; j < n; ++j) dot_tile<M, 1>(x, ldx, w + j * ldw, ldw, y + j, ldy, k);
}

static void gemm_nt(const float* x, int64_t ldx, const float* w, int64_t ldw, float* y, int64_t ldy,
                    int64_t m, int64_t n, int64_t k) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) dot_rows<4>(x + i * ldx, ldx, w, ldw, y + i * ldy, ldy, n, k);
  for (; i < m; ++i) dot_rows<1>(x + i * ldx, ldx, w, ldw, y + i * ldy, ldy, n, k);
}

// y[i, 0..16 * V) += sum_j g[i, j] * w[j, 0..16 * V)
template <int M, int V>
static inline void outer_block(const float* g, int64_t ldg, const float* w, int64_t ldw, float* y,
                               int64_t ldy, int64_t n) {
  F sum[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) sum[i][v] = load(y + i * ldy + 16 * v);
  for (int64_t j = 0; j < n; ++j) {
    F ws[V];
    for (int v = 0; v < V; ++v) ws[v] = load(w + j * ldw + 16 * v);
    for (int i = 0; i < M; ++i) {
      const F factor = set1(g[i * ldg + j]);
      for (int v = 0; v < V; ++v) sum[i][v] = fma(factor, ws[v], sum[i][v]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) store(y + i * ldy + 16 * v, sum[i][v]);
}

template <int M>
static inline void outer_rows(const float* g, int64_t ldg, const float* w, int64_t ldw, float* y,
                              int64_t ldy, int64_t n, int64_t k) {
  int64_t p = 0;
  for (; p + 32 <= k; p += 32) outer_block<M, 2>(g, ldg, w + p, ldw, y + p, ldy, n);
  for (; p + 16 <= k; p += 16) outer_block<M, 1>(g, ldg, w + p, ldw, y + p, ldy, n);
  if (p == k) return;
  const int rest = static_cast<int>(k - p);
  for (int i = 0; i < M; ++i) {
    F sum = load_part(y + i * ldy + p, rest);
    for (int64_t j = 0; j < n; ++j)
      sum = fma(set1(g[i * ldg + j]), load_part(w + j * ldw + p, rest), sum);
    store_part(y + i * ldy + p, sum, rest);
  }
}

static void gemm_nn(const float* g, int64_t ldg, const float* w, int64_t ldw, float* y, int64_t ldy,
                    int64_t m, int64_t n, int64_t k) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) outer_rows<4>(g + i * ldg, ldg, w, ldw, y + i * ldy, ldy, n, k);
  for (; i < m; ++i) outer_rows<1>(g + i * ldg, ldg, w, ldw, y + i * ldy, ldy, n, k);
}
