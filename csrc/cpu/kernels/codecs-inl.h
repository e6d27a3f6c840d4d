// Stored codes to integer operands: one vector of 32-bit lanes becomes `kParts` vectors of words or
// bytes. Included by each target.

// The codes of sixteen lanes as they are stored. The third bits of 3-bit codes, which are a plane of
// their own, are spread so that each word (or byte) holds those of its codes in its low bits.
struct Stored {
  I low, high;
};

template <int Bits>
constexpr int kColsPerLane = Bits == 8 ? 4 : Bits == 4 ? 8 : 16;

// An operand is a code plus `offset`, or a level over `factor` plus `offset`.
struct OperandRange {
  float factor, offset;
};

// Levels as 16-bit integers, or codes less the middle of the grid.
template <int Bits>
struct WordCodec {
  static constexpr int kBits = Bits;
  static constexpr bool kWords = true;
  static constexpr int kParts = kColsPerLane<Bits> / 2;
  WordTable table;

  static I spread(I bytes) { return widen_bytes(bytes); }

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
        float largest = 1e-30f;
        for (int i = 0; i < 1 << Bits; ++i) {
          const float size = levels[i] < 0.0f ? -levels[i] : levels[i];
          largest = size > largest ? size : largest;
        }
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

  void expand(const Stored& codes, I* parts) const {
    if constexpr (Bits == 8) {
      parts[0] = sub_16(and_i(codes.low, set1_16(0xff)), set1_16(128));
      parts[1] = sub_16(shift_right_16(codes.low, 8), set1_16(128));
    } else if constexpr (Bits == 3) {
      const I high = shift_left_16(codes.high, 2);
      for (int p = 0; p < kParts; ++p) {
        // Part p holds weight 4 * (p / 4) + 3 - p % 4 of the word; its third bit is counted from
        // the top of the byte.
        const int weight = 4 * (p / 4) + 3 - p % 4;
        parts[p] = lookup_words(table, select_bits(set1_16(3), shift_right_16(codes.low, 2 * p),
                                                   shift_right_16(high, 7 - weight)));
      }
    } else {
      for (int p = 0; p < kParts; ++p)
        parts[p] = lookup_words(table, shift_right_16(codes.low, Bits * p));
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
  ByteTable table;

  static I spread(I bytes) {
    // Of the four bits of each byte of codes, the first half of a byte goes to the first of two.
    const I word = widen_bytes(bytes);
    return and_i(or_i(shift_right_16(word, 4), shift_left_16(word, 8)), set1_16(0x0f0f));
  }

  OperandRange prepare(const PackedView& view, int64_t row) {
    if constexpr (!kTable) {
      return {1.0f, 0.0f};
    } else {
      float levels[16];
      store(levels, levels_of_row<Bits>(view, row));
      float largest = 1e-30f;
      for (int i = 0; i < 1 << Bits; ++i) {
        const float size = levels[i] < 0.0f ? -levels[i] : levels[i];
        largest = size > largest ? size : largest;
      }
      float scaled[16];
      store(scaled, round_even(mul(load(levels), set1(127.0f / largest))));
      uint8_t entries[16];
      for (int i = 0; i < 16; ++i)
        entries[i] = static_cast<uint8_t>(128 + static_cast<int>(scaled[i % (1 << Bits)]));
      table = byte_table(entries);
      return {largest / 127.0f, 128.0f};
    }
  }

  void expand(const Stored& codes, I* parts) const {
    if constexpr (Bits == 8) {
      parts[0] = codes.low;
    } else {
      const I mask = set1_16(Bits == 4 ? 0x0f0f : Bits == 3 ? 0x0707 : 0x0303);
      const I high = Bits == 3 ? shift_left_16(codes.high, 2) : codes.low;
      constexpr int kShift = Bits == 4 ? 4 : 2;
      for (int p = 0; p < kParts; ++p) {
        I code = shift_right_16(codes.low, kShift * p);
        if constexpr (Bits == 3)
          code = select_bits(set1_16(0x0303), code, shift_right_16(high, p));
        code = and_i(code, mask);
        parts[p] = kTable ? lookup_bytes(table, code) : code;
      }
    }
  }
};

// Sixteen lanes of a row from lane 16 * block, all of them within the row.
template <class Codec>
static inline Stored load_stored(const PackedView& view, const uint8_t* row, int64_t block) {
  const I low = load_i(row + 64 * block);
  if constexpr (Codec::kBits != 3) return {low, low};
  return {low, Codec::spread(load_bytes(row + view.plane_bytes + 32 * block, 32))};
}

// The last ones of a row; what lies beyond it reads as zeros.
template <class Codec>
static inline Stored load_stored_tail(const PackedView& view, const uint8_t* row, int64_t block) {
  const int64_t low_bytes = Codec::kBits == 3 ? view.plane_bytes : view.row_bytes;
  const I low = load_bytes(row + 64 * block, low_bytes - 64 * block);
  if constexpr (Codec::kBits != 3) return {low, low};
  const int64_t rest = view.row_bytes - view.plane_bytes - 32 * block;
  return {low, Codec::spread(load_bytes(row + view.plane_bytes + 32 * block, rest < 32 ? rest : 32))};
}

// Blocks of a row that load_stored may read.
template <class Codec>
static inline int64_t whole_blocks(const PackedView& view) {
  return view.cols / (16 * kColsPerLane<Codec::kBits>);
}

// n groups' values, each for as many units as a group has. Whole vectors are stored: the next group
// overwrites what is too much, and the caller leaves 16 floats beyond the last.
static inline void repeat_per_unit(const float* values, int64_t n, int64_t units, float* out) {
  for (int64_t g = 0; g < n; ++g) {
    const F value = set1(values[g]);
    for (int64_t u = 0; u < units; u += 16) store(out + g * units + u, value);
  }
}

// Of one row, per unit: factor * (integer product - (zero point + offset) * sum of q) is the unit's
// share; `shift` is factor * (zero point + offset). True where any shift may differ from zero; else
// `shift` is not written. Both hold `units` floats, the last ones zero, and 16 to spare.
template <int Bits>
static inline bool load_units(const PackedView& view, int64_t row, int64_t unit, int64_t units,
                              const OperandRange& range, float* factor, float* shift) {
  constexpr float kMiddle = static_cast<float>(1 << (Bits - 1));
  const bool integer = view.family == Family::kInteger;
  const bool stored_zero = view.zero_kind == Zero::kInt || view.zero_kind == Zero::kFloat;
  const float zero_point =
      !integer ? 0.0f : view.zero_kind == Zero::kMidrise ? kMiddle - 0.5f : kMiddle;
  const bool shifted = stored_zero || zero_point + range.offset != 0.0f;
  const int64_t used = (view.cols + unit - 1) / unit;
  const int64_t per_group = view.groups == 1 ? used : view.group_size / unit;
  const F by = set1(range.factor), offset = set1(range.offset);
  Parameters parameters;
  float shifts[kParameters];
  for (int64_t base = 0; base < view.groups; base += kParameters) {
    const int64_t n = base + kParameters < view.groups ? kParameters : view.groups - base;
    load_parameters<Bits>(view, row, base, n, &parameters);
    float* factors = per_group == 1 ? factor + base : parameters.scale;
    float* group_shifts = per_group == 1 ? shift + base : shifts;
    for (int64_t i = 0; i < n; i += 16) {
      const F scale = mul(load(parameters.scale + i), by);
      store(factors + i, scale);
      if (!shifted) continue;
      const F point = integer ? load(parameters.zero_point + i) : zero();
      store(group_shifts + i, mul(scale, add(point, offset)));
    }
    if (per_group == 1) continue;
    repeat_per_unit(parameters.scale, n, per_group, factor + base * per_group);
    if (shifted) repeat_per_unit(shifts, n, per_group, shift + base * per_group);
  }
  for (int64_t u = used; u < units; ++u) factor[u] = 0.0f;
  if (shifted) {
    for (int64_t u = used; u < units; ++u) shift[u] = 0.0f;
  }
  return shifted;
}
