// Integer lanes: what codes and integer products need, in plain C++. A vector I is sixteen 32-bit
// lanes, and as many bytes and 16-bit words as fit in them, little-endian. Included inside the
// target's namespace, after portable.h.

// Rows of activations in the register tile of a panel's product, and whether expanding codes again
// for each tile slows it down.
constexpr int kTileRows = 4;
constexpr int kTilePanels = 1;
constexpr int kWalkedRows = 1;
constexpr int kRowsTogether = 1;  // of the weight, in the walk over rows
constexpr bool kExpandingCosts = true;

#define BITFOLD_LANES for (int i = 0; i < 16; ++i)
#define BITFOLD_WORDS for (int i = 0; i < 32; ++i)

struct Words {
  uint16_t lane[32];
};
static inline Words words(I x) {
  Words w;
  memcpy(w.lane, x.lane, sizeof w.lane);
  return w;
}
static inline I join(Words w) {
  I x;
  memcpy(x.lane, w.lane, sizeof w.lane);
  return x;
}

static inline I load_i(const void* p) {
  I r;
  memcpy(r.lane, p, sizeof r.lane);
  return r;
}
// The same, where many uses shall not be many loads.
static inline I load_once(const void* p) { return load_i(p); }
static inline void store_i(void* p, I x) { memcpy(p, x.lane, sizeof x.lane); }
// The first 32 bytes; anything after them.
static inline I load_half_i(const void* p) {
  I r = zero_i();
  memcpy(r.lane, p, 32);
  return r;
}
// The first n bytes, or all 64; zeros after them.
static inline I load_bytes(const uint8_t* p, int64_t n) {
  I r = zero_i();
  memcpy(r.lane, p, static_cast<size_t>(n < 64 ? n : 64));
  return r;
}
static inline I set1_i(int v) {
  I r;
  BITFOLD_LANES r.lane[i] = v;
  return r;
}
static inline I broadcast_i(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return set1_i(v);
}
static inline I set1_16(int v) {
  return set1_i(static_cast<int>(static_cast<uint32_t>(v & 0xffff) * 0x10001u));
}
static inline I and_i(I x, I y) {
  BITFOLD_LANES x.lane[i] &= y.lane[i];
  return x;
}
static inline I or_i(I x, I y) {
  BITFOLD_LANES x.lane[i] |= y.lane[i];
  return x;
}
// Bits of x where the mask is set, of y elsewhere.
static inline I select_bits(I mask, I x, I y) {
  BITFOLD_LANES x.lane[i] = (x.lane[i] & mask.lane[i]) | (y.lane[i] & ~mask.lane[i]);
  return x;
}
static inline I add_i(I x, I y) {
  BITFOLD_LANES x.lane[i] += y.lane[i];
  return x;
}
static inline I shift_left_i(I x, int n) {
  BITFOLD_LANES x.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) << n);
  return x;
}
static inline I sub_16(I x, I y) {
  Words a = words(x);
  const Words b = words(y);
  BITFOLD_WORDS a.lane[i] = static_cast<uint16_t>(a.lane[i] - b.lane[i]);
  return join(a);
}
static inline I shift_left_16(I x, int n) {
  Words a = words(x);
  BITFOLD_WORDS a.lane[i] = static_cast<uint16_t>(a.lane[i] << n);
  return join(a);
}
static inline I shift_right_16(I x, int n) {
  Words a = words(x);
  BITFOLD_WORDS a.lane[i] = static_cast<uint16_t>(a.lane[i] >> n);
  return join(a);
}
// The lower 32 bytes as words.
static inline I widen_bytes(I x) {
  uint8_t bytes[32];
  memcpy(bytes, x.lane, sizeof bytes);
  Words a;
  BITFOLD_WORDS a.lane[i] = bytes[i];
  return join(a);
}

// 32 words, periodic in 16: the index of a word is its low four bits, whatever lies above.
struct WordTable {
  int16_t entry[32];
};
static inline WordTable word_table(const int16_t* entries) {
  WordTable t;
  memcpy(t.entry, entries, sizeof t.entry);
  return t;
}
static inline I lookup_words(const WordTable& table, I at) {
  Words a = words(at);
  BITFOLD_WORDS a.lane[i] = static_cast<uint16_t>(table.entry[a.lane[i] & 15]);
  return join(a);
}
// 16 bytes; the index of a byte is the byte itself, below 16.
struct ByteTable {
  uint8_t entry[16];
};
static inline ByteTable byte_table(const uint8_t* entries) {
  ByteTable t;
  memcpy(t.entry, entries, sizeof t.entry);
  return t;
}
static inline I lookup_bytes(const ByteTable& table, I at) {
  uint8_t bytes[64];
  memcpy(bytes, at.lane, sizeof bytes);
  for (int i = 0; i < 64; ++i) bytes[i] = table.entry[bytes[i] & 15];
  memcpy(at.lane, bytes, sizeof bytes);
  return at;
}

// Each lane adds the products of its two signed words.
static inline I dot_words(I sum, I w, I x) {
  const Words a = words(w), b = words(x);
  BITFOLD_LANES sum.lane[i] +=
      static_cast<int16_t>(a.lane[2 * i]) * static_cast<int16_t>(b.lane[2 * i]) +
      static_cast<int16_t>(a.lane[2 * i + 1]) * static_cast<int16_t>(b.lane[2 * i + 1]);
  return sum;
}
// Each lane adds the products of its four bytes, unsigned in w (below 16 where kSmall) and signed
// in x.
template <bool kSmall>
static inline I dot_bytes(I sum, I w, I x) {
  uint8_t a[64];
  int8_t b[64];
  memcpy(a, w.lane, sizeof a);
  memcpy(b, x.lane, sizeof b);
  BITFOLD_LANES {
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum.lane[i] += a[j] * b[j];
  }
  return sum;
}
// The same with four bytes at p in every lane.
static inline I dot_words_with(I sum, I w, const void* p) {
  return dot_words(sum, w, broadcast_i(p));
}
template <bool kSmall>
static inline I dot_bytes_with(I sum, I w, const void* p) {
  return dot_bytes<kSmall>(sum, w, broadcast_i(p));
}

// Inside of each four lanes: with 4 vectors, x[i] lane j becomes x[j] lane i; with 2, the even
// lanes of both become the first vector (two of x[0], two of x[1]), the odd ones the second; 1
// stays.
template <int kTurned>
static inline void turn_lanes(I* x) {
  if constexpr (kTurned == 1) return;
  I t[kTurned];
  for (int v = 0; v < kTurned; ++v) BITFOLD_LANES {
      const int at = i % 4 * kTurned / 4, lane = i % 4 * kTurned % 4 + v;
      t[v].lane[i] = x[at].lane[i / 4 * 4 + lane];
    }
  for (int v = 0; v < kTurned; ++v) x[v] = t[v];
}
// x[i] lane j becomes x[j] lane i.
static inline void transpose(I* x) {
  BITFOLD_LANES {
    for (int j = 0; j < i; ++j) {
      const int32_t kept = x[i].lane[j];
      x[i].lane[j] = x[j].lane[i];
      x[j].lane[i] = kept;
    }
  }
}
// Inlined by force: g++ drops calls to what does nothing but prefetch.
[[gnu::always_inline]] static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
[[gnu::always_inline]] static inline void prefetch_far(const void* p) {
  __builtin_prefetch(p, 0, 2);
}
// Sixteen entries of a table, by bytes.
static inline F pick(const float* table, const uint8_t* at) {
  F r;
  BITFOLD_LANES r.lane[i] = table[at[i]];
  return r;
}

#undef BITFOLD_LANES
#undef BITFOLD_WORDS
