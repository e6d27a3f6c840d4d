// What has no better form than plain C++ without 32 wide registers: one body for the portable and
// the AVX2 target. Included inside the target's namespace, after its own _dot.h; AVX-512 brings its
// own.

// 32 entries of a table of 256.
struct WideTable {
  const float* entries;
};
static inline WideTable wide_table(const float* entries) { return {entries}; }
static inline void lookup_wide(const WideTable& table, const uint8_t* at, F* out) {
  out[0] = pick(table.entries, at);
  out[1] = pick(table.entries, at + 16);
}

// out[i] = q[order[i]], i < 64, as 16-bit words or as bytes; the order of bytes leaves none of its
// sixteen.
static inline void place_words(const int32_t* q, const uint8_t* order, uint8_t* out) {
  for (int i = 0; i < 64; ++i) {
    const int16_t word = static_cast<int16_t>(q[order[i]]);
    memcpy(out + 2 * i, &word, sizeof word);
  }
}
static inline void place_bytes(const int32_t* q, const uint8_t* order, uint8_t* out) {
  for (int i = 0; i < 64; ++i) out[i] = static_cast<uint8_t>(q[order[i]]);
}

// Lane i is the lanes of rows[i], sixteen rows, joined in the order of reduce_add.
template <class Join>
static inline F join_lanes(const float* rows, const Join& join) {
  I lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = load_i(rows + 16 * i);
  transpose(lanes);
  float turned[16 * 16];
  for (int i = 0; i < 16; ++i) store_i(turned + 16 * i, lanes[i]);
  F all[16];
  for (int i = 0; i < 16; ++i) all[i] = load(turned + 16 * i);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) all[i] = join(all[i], all[i + step]);
  return all[0];
}
