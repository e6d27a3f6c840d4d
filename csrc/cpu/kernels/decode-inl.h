// Stored bytes to floats. Included by each target.

// Where decoded weights go: sixteen floats, or halves of either kind, to element `at`; kStream goes
// around the caches.
template <FloatType kType, bool kStream>
struct Destination {
  void* out;
  void put(int64_t at, F v) const {
    if constexpr (kType == FloatType::kFloat32) {
      float* p = static_cast<float*>(out) + at;
      kStream ? stream(p, v) : store(p, v);
    } else {
      uint16_t* p = static_cast<uint16_t*>(out) + at;
      if constexpr (kType == FloatType::kFloat16) {
        kStream ? stream_half(p, v) : store_half(p, v);
      } else {
        kStream ? stream_bfloat16(p, v) : store_bfloat16(p, v);
      }
    }
  }
  // Thirty-two halves of this kind at once, `at` a multiple of 32 where they go around the caches.
  static constexpr bool kHalves = kType != FloatType::kFloat32;
  static HalfTable table_of(F levels) {
    return kType == FloatType::kFloat16 ? half_table(levels) : bfloat16_table(levels);
  }
  void put_halves(int64_t at, I v) const {
    uint16_t* p = static_cast<uint16_t*>(out) + at;
    kStream ? stream_i(p, v) : store_i(p, v);
  }
  void put_part(int64_t at, F v, int n) const {
    if constexpr (kType == FloatType::kFloat32) {
      store_part(static_cast<float*>(out) + at, v, n);
    } else {
      uint16_t bits[16];
      Destination<kType, false>{bits}.put(0, v);
      memcpy(static_cast<uint16_t*>(out) + at, bits, sizeof(uint16_t) * static_cast<size_t>(n));
    }
  }
};

// Puts value(codes) of the columns [col, col + n) of one group at element `to` and after.
template <int Bits, class Out, class Value>
static inline void decode_group(const PackedView& view, const uint8_t* row, int64_t col, int64_t n,
                                const Out& out, int64_t to, const Value& value) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    out.put(to + i, value(codes_at<Bits>(row, view.plane_bytes, col + i)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    out.put_part(to + i, value(codes_at_tail<Bits>(row, view.plane_bytes, col + i, rest)), rest);
  }
}

template <int Bits>
static inline I words_at(const uint8_t* row, int64_t plane_bytes, int64_t col) {
  if constexpr (Bits == 4) return words_of_4(row + col / 2);
  if constexpr (Bits == 2) return words_of_2(row + col / 4);
  if constexpr (Bits == 3) return words_of_3(row + col / 4, row + plane_bytes + col / 8);
}

// The same by a table of the group's sixteen decoded weights (fewer bits: repeated). Halves are
// rounded in the table, not each time that one is decoded.
template <int Bits, class Out>
static inline void decode_by_table(const PackedView& view, const uint8_t* row, int64_t col,
                                   int64_t n, const Out& out, int64_t to, F table) {
  const auto value = [&](I code) { return lookup(table, code); };
  if constexpr (Out::kHalves) {
    if (to % 32 != 0 && n >= 16) {
      decode_group<Bits>(view, row, col, 16, out, to, value);
      col += 16, to += 16, n -= 16;
    }
    if (n >= 32) {
      const HalfTable halves = Out::table_of(table);
      for (; n >= 32; col += 32, to += 32, n -= 32)
        out.put_halves(to, lookup_halves(halves, words_at<Bits>(row, view.plane_bytes, col)));
    }
  }
  decode_group<Bits>(view, row, col, n, out, to, value);
}

// By code: the codebook of a row, or the codes of an integer grid; periodic in the number of codes.
template <int Bits>
static inline F levels_of_row(const PackedView& view, int64_t row) {
  constexpr int kLevels = Bits < 8 ? 1 << Bits : 16;  // of 8 bits, too many for a table, unused
  float levels[16];
  if (view.family == Family::kInteger) {
    memcpy(levels, kCodes, sizeof levels);
  } else if (view.family == Family::kFixedCodebook) {
    memcpy(levels, view.levels, kLevels * sizeof(float));
  } else {
    const uint16_t* stored = view.codebook + row * view.scale_row_stride * kLevels;
    store(levels, mul(halves_at(stored, kLevels), set1(view.factor)));
  }
  for (int i = kLevels; i < 16; ++i) levels[i] = levels[i - kLevels];
  return load(levels);
}

template <int Bits, class Out>
static void decode_bits(const PackedView& view, int64_t row, int64_t col, int64_t n,
                        const Out& out) {
  const uint8_t* codes = view.codes + row * view.row_bytes;
  const F levels = levels_of_row<Bits>(view, row);
  Parameters parameters;
  int64_t group = col / view.group_size;  // a division costs as much as decoding a vector
  int64_t base = 0, loaded = 0;           // parameters hold the groups [base, loaded)
  for (int64_t at = col; at < col + n; ++group) {
    if (group >= loaded) {
      base = group & ~int64_t{15};
      loaded = base + kParameters < view.groups ? base + kParameters : view.groups;
      load_parameters<Bits>(view, row, base, loaded - base, &parameters);
    }
    int64_t end = (group + 1) * view.group_size;
    end = end < col + n ? end : col + n;
    const F scale = set1(parameters.scale[group - base]);
    const F zero_point = set1(parameters.zero_point[group - base]);
    if constexpr (Bits == 8) {
      decode_group<8>(view, codes, at, end - at, out, at - col,
                      [&](I code) { return mul(sub(to_float(code), zero_point), scale); });
    } else {
      // An integer grid of up to 16 levels is a codebook too, shifted by the group's zero point.
      const F table = view.family == Family::kInteger ? sub(levels, zero_point) : levels;
      decode_by_table<Bits>(view, codes, at, end - at, out, at - col, mul(table, scale));
    }
    at = end;
  }
}

template <class Out>
static inline void decode_to(const PackedView& view, int64_t row, int64_t col, int64_t n,
                             const Out& out) {
  switch (view.bits) {
    case 8:
      return decode_bits<8>(view, row, col, n, out);
    case 4:
      return decode_bits<4>(view, row, col, n, out);
    case 3:
      return decode_bits<3>(view, row, col, n, out);
    case 2:
      return decode_bits<2>(view, row, col, n, out);
    default:
      return;
  }
}

static void decode(const PackedView& view, int64_t row, int64_t col, int64_t n, float* out) {
  decode_to(view, row, col, n, Destination<FloatType::kFloat32, false>{out});
}

// The CPU follows one stream by itself, not two planes in turn.
static inline void prefetch_planes(const PackedView& view, int64_t row) {
  constexpr int64_t kAhead = 4096;  // bytes; the rows after this one
  const uint8_t* codes = view.codes + row * view.row_bytes + kAhead;
  for (int64_t at = 0; at < view.row_bytes; at += 64) prefetch_far(codes + at);
}

template <FloatType kType>
static inline void decode_row_to(const PackedView& view, int64_t row, void* out, bool stream) {
  // Such stores want whole lines: a row that starts within one is written the ordinary way.
  if (stream && reinterpret_cast<uintptr_t>(out) % 64 == 0)
    return decode_to(view, row, 0, view.cols, Destination<kType, true>{out});
  decode_to(view, row, 0, view.cols, Destination<kType, false>{out});
}

static void decode_row(const PackedView& view, int64_t row, FloatType dtype, void* out,
                       bool stream) {
  if (stream && view.bits == 3) prefetch_planes(view, row);
  switch (dtype) {
    case FloatType::kFloat32:
      return decode_row_to<FloatType::kFloat32>(view, row, out, stream);
    case FloatType::kFloat16:
      return decode_row_to<FloatType::kFloat16>(view, row, out, stream);
    case FloatType::kBFloat16:
      return decode_row_to<FloatType::kBFloat16>(view, row, out, stream);
  }
}

static void span_to_float(const void* source, FloatType dtype, int64_t n, float* out) {
  if (dtype == FloatType::kFloat32) {
    memcpy(out, source, sizeof(float) * static_cast<size_t>(n));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source);
  const bool is_half = dtype == FloatType::kFloat16;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    store(out + i, is_half ? load_half(from + i) : load_bfloat16(from + i));
  if (i < n) {
    uint16_t tail[16] = {};
    memcpy(tail, from + i, sizeof(uint16_t) * static_cast<size_t>(n - i));
    store_part(out + i, is_half ? load_half(tail) : load_bfloat16(tail), static_cast<int>(n - i));
  }
}

static void span_from_float(const float* source, int64_t n, FloatType dtype, void* out) {
  const int64_t whole = n / 16 * 16;
  const int rest = static_cast<int>(n - whole);
  if (dtype == FloatType::kFloat32) {  // not memcpy, whose call costs as much as a short span
    float* to = static_cast<float*>(out);
    for (int64_t i = 0; i < whole; i += 16) store(to + i, load(source + i));
    if (rest) store_part(to + whole, load_part(source + whole, rest), rest);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  const bool is_half = dtype == FloatType::kFloat16;
  const auto convert = [is_half](uint16_t* p, F v) {
    is_half ? store_half(p, v) : store_bfloat16(p, v);
  };
  for (int64_t i = 0; i < whole; i += 16) convert(to + i, load(source + i));
  if (rest == 0) return;
  uint16_t bits[16];
  convert(bits, load_part(source + whole, rest));
  memcpy(to + whole, bits, sizeof(uint16_t) * static_cast<size_t>(rest));
}

static void rows_from_float(const float* source, int64_t ld, int64_t rows, int64_t n,
                            FloatType dtype, void* out, int64_t ld_out) {
  const int64_t stride = ld_out * (dtype == FloatType::kFloat32 ? 4 : 2);
  for (int64_t i = 0; i < rows; ++i)
    span_from_float(source + i * ld, n, dtype, static_cast<char*>(out) + i * stride);
}
