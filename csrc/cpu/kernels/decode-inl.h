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

// By code: the codebook of a row, or the codes of an integer grid.
template <int Bits>
static inline F levels_of_row(const PackedView& view, int64_t row) {
  if constexpr (Bits == 8) return zero();  // too many for a table
  if (view.family == Family::kInteger) return load(kCodes);
  if (view.family == Family::kFixedCodebook) return load_part(view.levels, 1 << Bits);
  const uint16_t* stored = view.codebook + ((row * view.scale_row_stride) << Bits);
  return mul(halves_at(stored, 1 << Bits), set1(view.factor));
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
    if constexpr (Bits == 8) {
      const F zero_point = set1(parameters.zero_point[group - base]);
      decode_group<8>(view, codes, at, end - at, out, at - col,
                      [&](I code) { return mul(sub(to_float(code), zero_point), scale); });
    } else {
      // An integer grid of up to 16 levels is a codebook too, shifted by the group's zero point.
      const F table = view.family == Family::kInteger
                          ? sub(levels, set1(parameters.zero_point[group - base]))
                          : levels;
      decode_group<Bits>(view, codes, at, end - at, out, at - col,
                         [&](I code) { return mul(lookup(table, code), scale); });
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

template <FloatType kType>
static inline void decode_row_to(const PackedView& view, int64_t row, void* out, bool stream) {
  // Such stores want whole lines: a row that starts within one is written the ordinary way.
  if (stream && reinterpret_cast<uintptr_t>(out) % 64 == 0)
    return decode_to(view, row, 0, view.cols, Destination<kType, true>{out});
  decode_to(view, row, 0, view.cols, Destination<kType, false>{out});
}

static void decode_row(const PackedView& view, int64_t row, FloatType dtype, void* out,
                       bool stream) {
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
  if (dtype == FloatType::kFloat32) {
    memcpy(out, source, sizeof(float) * static_cast<size_t>(n));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  const bool is_half = dtype == FloatType::kFloat16;
  const auto convert = [is_half](uint16_t* p, F v) {
    is_half ? store_half(p, v) : store_bfloat16(p, v);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) convert(to + i, load(source + i));
  if (i == n) return;
  const int rest = static_cast<int>(n - i);
  uint16_t bits[16];
  convert(bits, load_part(source + i, rest));
  memcpy(to + i, bits, sizeof(uint16_t) * static_cast<size_t>(rest));
}
