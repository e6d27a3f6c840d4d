// Products of tiles of bfloat16 numbers, AMX. Included by its target alone.

// Tile registers: four of sums, two of the weight, two of activations.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);
alignas(64) static constexpr TileShapes kTileShapes;

static inline F float_of(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
// What the nearest bfloat16 number leaves of x; nothing where that is infinite.
static inline F rest_of(F x, __m256i nearest) {
  const F rest = sub(x, float_of(nearest));
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(abs(rest), set1(__builtin_inff()), _CMP_LT_OQ),
                             rest);
}

static void split(const float* rows, int64_t ld, int64_t planes, bool turned, uint16_t* tile,
                  int64_t plane) {
  I nearest[16], rest[16];
  for (int i = 0; i < 16; ++i) {
    const F low = load(rows + i * ld), high = load(rows + i * ld + 16);
    nearest[i] = (I)_mm512_cvtne2ps_pbh(high, low);
    if (planes == 2)
      rest[i] = (I)_mm512_cvtne2ps_pbh(rest_of(high, _mm512_extracti64x4_epi64(nearest[i], 1)),
                                       rest_of(low, _mm512_castsi512_si256(nearest[i])));
  }
  const auto store_tile = [turned](I* vectors, uint16_t* to) {
    if (turned) transpose(vectors);
    for (int i = 0; i < 16; ++i) store_i(to + 32 * i, vectors[i]);
  };
  store_tile(nearest, tile);
  if (planes == 2) store_tile(rest, tile + plane);
}

// Sums of 32 rows of the weight and kWide tiles of activations stay in tiles over all columns.
template <int kWide>
static inline void multiply_strip(const Bfloat16Product& p, const uint16_t* x, float* sums) {
  constexpr int64_t kTile = Bfloat16Tile::kSize, kSums = Bfloat16Tile::kSums;
  const int64_t w_plane = 2 * p.cols * kTile, x_plane = p.x_tiles * p.x_cols * kTile;
  const auto load_w = [&](int64_t plane, int64_t col) {
    const uint16_t* at = p.w + plane * w_plane + col * kTile;
    _tile_loadd(4, at, 64);
    _tile_loadd(5, at + p.cols * kTile, 64);
  };
  const auto load_x = [&](int64_t plane, int64_t col) {
    const uint16_t* at = x + plane * x_plane + col * kTile;
    _tile_loadd(6, at, 64);
    if constexpr (kWide == 2) _tile_loadd(7, at + p.x_cols * kTile, 64);
  };
  const auto multiply = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kWide == 2) {
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + kSums, 64);
  if constexpr (kWide == 2) {
    _tile_loadd(2, sums + 2 * kSums, 64);
    _tile_loadd(3, sums + 3 * kSums, 64);
  }
  for (int64_t col = 0; col < p.cols; ++col) {
    load_x(0, col);
    if (p.w_planes == 2) {
      load_w(1, col);
      multiply();
    }
    load_w(0, col);
    multiply();
    if (p.x_planes == 2) {
      load_x(1, col);
      multiply();
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSums, 64);
  if constexpr (kWide == 2) {
    _tile_stored(2, sums + 2 * kSums, 64);
    _tile_stored(3, sums + 3 * kSums, 64);
  }
}

// What tiles read was stored before this call, through the kernel table: the compiler does not know
// that their instructions read memory.
static void multiply_tiles(const Bfloat16Product& product) {
  const Bfloat16Product p = product;
  _tile_loadconfig(&kTileShapes);
  for (int64_t i = 0; i < p.x_tiles; i += 2) {
    const uint16_t* x = p.x + i * p.x_cols * Bfloat16Tile::kSize;
    float* sums = p.sums + i * 2 * Bfloat16Tile::kSums;
    if (i + 2 <= p.x_tiles) {
      multiply_strip<2>(p, x, sums);
    } else {
      multiply_strip<1>(p, x, sums);
    }
  }
  _tile_release();  // or the system saves tiles whenever it switches threads
}

static void turn_sums(const float* sums, float* rows) {
  for (int tile = 0; tile < 2; ++tile) {
    I lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = load_i(sums + Bfloat16Tile::kSums * tile + 16 * i);
    transpose(lanes);
    for (int i = 0; i < 16; ++i) store_i(rows + 32 * i + 16 * tile, lanes[i]);
  }
}

const Bfloat16Kernels bfloat16 = {
    .split = split,
    .multiply = multiply_tiles,
    .turn_sums = turn_sums,
};
