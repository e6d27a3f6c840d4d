// Sums of products of 8-bit codes with 8-bit activations over whole rows: exact integers, for
// LLM.int8(). Included by each target.

// The lanes of N * M sums fit the registers, operands beside them.
constexpr int kDotTile = kTileRows >= 12 ? 4 : 2;

static inline int32_t sum_lanes(I x) {
  int32_t lane[16], sum = 0;
  store_i(lane, x);
  for (int i = 0; i < 16; ++i) sum += lane[i];
  return sum;
}

// y[i, j] = dot(codes[j], q[i]) for i < M, j < N.
template <int M, int N>
static inline void dot_codes_tile(const uint8_t* codes, int64_t ldw, const int8_t* q, int64_t ldq,
                                  int64_t cols, int32_t* y, int64_t ldy) {
  I sum[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sum[i][j] = zero_i();
  const auto step = [&](const I* ws, int64_t c) {
    for (int i = 0; i < M; ++i) {
      const I x = load_i(q + i * ldq + c);
      for (int j = 0; j < N; ++j) sum[i][j] = dot_bytes<false>(sum[i][j], ws[j], x);
    }
  };
  I ws[N];
  int64_t c = 0;
  for (; c + 64 <= cols; c += 64) {
    for (int j = 0; j < N; ++j) {
      if (M == 1) prefetch_far(codes + j * ldw + c + 4096);
      ws[j] = load_i(codes + j * ldw + c);
    }
    step(ws, c);
  }
  if (c < cols) {
    for (int j = 0; j < N; ++j) ws[j] = load_bytes(codes + j * ldw + c, cols - c);
    step(ws, c);
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) y[i * ldy + j] = sum_lanes(sum[i][j]);
}

template <int M>
static inline void dot_codes_rows(const uint8_t* codes, int64_t ldw, int64_t n, const int8_t* q,
                                  int64_t ldq, int64_t cols, int32_t* y, int64_t ldy) {
  int64_t j = 0;
  if (M > 1) {  // one row of activations: a single stream, which the prefetcher follows
    for (; j + kDotTile <= n; j += kDotTile)
      dot_codes_tile<M, kDotTile>(codes + j * ldw, ldw, q, ldq, cols, y + j, ldy);
  }
  for (; j < n; ++j) dot_codes_tile<M, 1>(codes + j * ldw, ldw, q, ldq, cols, y + j, ldy);
}

static void dot_codes(const uint8_t* codes, int64_t ldw, int64_t n, const int8_t* q, int64_t ldq,
                      int64_t m, int64_t cols, int32_t* y, int64_t ldy) {
  int64_t i = 0;
  for (; i + kDotTile <= m; i += kDotTile)
    dot_codes_rows<kDotTile>(codes, ldw, n, q + i * ldq, ldq, cols, y + i * ldy, ldy);
  for (; i < m; ++i) dot_codes_rows<1>(codes, ldw, n, q + i * ldq, ldq, cols, y + i * ldy, ldy);
}
