// Stored codes to integer operands: one vector of 32-bit lanes becomes `kParts` vectors of words or
// bytes. Included by each target.

// The codes of sixteen lanes as they are stored. The third bits of 3-bit codes, which are a plane
// of their own, are spread so that each word (or byte) holds those of its codes from bit 2 up.
struct Stored {
  I low, high;
};

// A number as a type, to be handed to generic lambdas.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <int Bits>
constexpr int kColsPerLane = Bits == 8   ? 4
                             : Bits == 4 ? 8
                                         : 16;

// Whether each row has levels of its own, so that codes of different rows mean different things.
static inline bool has_own_levels(const PackedView& view) {
  return view.family == Family::kLearnedCodebook && view.scale_row_stride != 0;
}

// An operand is a code plus `offset`, or a level over `factor` plus `offset`.
struct OperandRange {
  float factor, offset;
};

template <int Bits>
static inline float largest_level(const float* levels) {
  float largest = 1e-30f;  // of a codebook of zeros
  for (int i = 0; i < 1 << Bits; ++i) {
    const float size = levels[i] < 0.0f ? -levels[i] : levels[i];
    largest = size > largest ? size : largest;
  }
  return largest;
}

// Levels as 16-bit integers, or codes less the middle of the grid.
template <int Bits>
struct WordCodec {
  static constexpr int kBits = Bits;
  static constexpr bool kWords = true;
  static constexpr bool kSmall = false;  // of bytes only
  static constexpr int kParts = kColsPerLane<Bits> / 2;
  WordTable table{};

  static I spread(I bytes) { return shift_left_16(widen_bytes(bytes), 2); }

  OperandRange prepare(const PackedView& view, int64_t row) {
    constexpr float kMiddle = static_cast<float>(1 << (Bits - 1));
    if constexpr (Bits == 8) {
      return {1.0f, -kMiddle};
    } else {
      float levels[16];
      store(levels, levels_of_row<Bits>(view, row));
      OperandRange range{1.0f, -kMiddle};
      float inverse = 1.0f;
      if (view.family == Family::kInteger) {
        for (float& level : levels) level -= kMiddle;
      } else {
        const float largest = largest_level<Bits>(levels);
        inverse = static_cast<float>(kLevelLimit) / largest;
        range = {largest / static_cast<float>(kLevelLimit), 0.0f};
      }
      float scaled[16];
      store(scaled, round_even(mul(load(levels), set1(inverse))));
      int16_t entries[32];
      for (int i = 0; i < 32; ++i) entries[i] = static_cast<int16_t>(scaled[i % (1 << Bits)]);
      table = word_table(entries);
      return range;
    }
  }

  // p is known where this is inlined.
  I part(const Stored& codes, int p) const {
    if constexpr (Bits == 8) {
      const I code = p == 0 ? and_i(codes.low, set1_16(0xff)) : shift_right_16(codes.low, 8);
      return sub_16(code, set1_16(128));
    } else if constexpr (Bits == 3) {
      // Part p holds weight 4 * (p / 4) + 3 - p % 4 of a word; its third bit is counted from the
      // top of the byte.
      const int weight = 4 * (p / 4) + 3 - p % 4;
      const I high = shift_right_16(codes.high, 7 - weight);
      return lookup_words(table, select_bits(set1_16(3), shift_right_16(codes.low, 2 * p), high));
    } else {
      return lookup_words(table, p == 0 ? codes.low : shift_right_16(codes.low, Bits * p));
    }
  }
};

// Codes themselves, or levels as 8-bit integers.
template <int Bits, bool kLookUp>
struct ByteCodec {
  static constexpr int kBits = Bits;
  static constexpr bool kWords = false;
  static constexpr bool kTable = kLookUp;
  static constexpr int kParts = kColsPerLane<Bits> / 4;
  static constexpr bool kSmall = Bits < 8 && !kTable;
  ByteTable table{};

  static I spread(I bytes) {
    // Of the four bits of each byte of codes, the first half of a byte goes to the first of two.
    const I word = widen_bytes(bytes);
    return and_i(or_i(shift_right_16(word, 2), shift_left_16(word, 10)), set1_16(0x3c3c));
  }

  OperandRange prepare(const PackedView& view, int64_t row) {
    if constexpr (!kTable) {
      return {1.0f, 0.0f};
    } else {
      float levels[16];
      store(levels, levels_of_row<Bits>(view, row));
      const float largest = largest_level<Bits>(levels);
      float scaled[16];
      store(scaled, round_even(mul(load(levels), set1(127.0f / largest))));
      uint8_t entries[16];
      for (int i = 0; i < 16; ++i)
        entries[i] = static_cast<uint8_t>(128 + static_cast<int>(scaled[i % (1 << Bits)]));
      table = byte_table(entries);
      return {largest / 127.0f, 128.0f};
    }
  }

  I part(const Stored& codes, int p) const {
    if constexpr (Bits == 8) {
      return codes.low;
    } else {
      constexpr int kShift = Bits == 4 ? 4 : 2;
      I code = p == 0 ? codes.low : shift_right_16(codes.low, kShift * p);
      // (select_bits would copy its mask each time.)
      code = and_i(code, set1_16(Bits == 4 ? 0x0f0f : 0x0303));
      if constexpr (Bits == 3) {
        const I high = p == 0 ? codes.high : shift_right_16(codes.high, p);
        code = or_i(code, and_i(high, set1_16(0x0404)));
      }
      return kTable ? lookup_bytes(table, code) : code;
    }
  }
};

// Vector `at` of a row, all of it within the row.
template <class Codec>
static inline Stored load_stored(const PackedView& view, const uint8_t* row, int64_t at) {
  const I low = load_once(row + 64 * at);
  if constexpr (Codec::kBits != 3) return {low, low};
  return {low, Codec::spread(load_half_i(row + view.plane_bytes + 32 * at))};
}

// The last ones of a row; what lies beyond it reads as zeros.
template <class Codec>
static inline Stored load_stored_tail(const PackedView& view, const uint8_t* row, int64_t at) {
  const int64_t low_bytes = Codec::kBits == 3 ? view.plane_bytes : view.row_bytes;
  const I low = load_bytes(row + 64 * at, low_bytes - 64 * at);
  if constexpr (Codec::kBits != 3) return {low, low};
  const int64_t rest = view.row_bytes - view.plane_bytes - 32 * at;
  return {low, Codec::spread(load_bytes(row + view.plane_bytes + 32 * at, rest < 32 ? rest : 32))};
}

// `kTurned` vectors of lanes are turned inside of 128 bits, so that what shares a lane afterwards
// were neighbours: columns of one unit.
template <class Codec, int kTurned>
[[gnu::always_inline]] static inline void turn(Stored* codes) {
  I low[kTurned], high[kTurned];
  for (int v = 0; v < kTurned; ++v) low[v] = codes[v].low, high[v] = codes[v].high;
  turn_lanes<kTurned>(low);
  if constexpr (Codec::kBits == 3) turn_lanes<kTurned>(high);
  for (int v = 0; v < kTurned; ++v) codes[v] = {low[v], Codec::kBits == 3 ? high[v] : low[v]};
}

// Vectors of a row that load_stored may read.
template <class Codec>
static inline int64_t whole_vectors(const PackedView& view) {
  return view.cols / (16 * kColsPerLane<Codec::kBits>);
}
