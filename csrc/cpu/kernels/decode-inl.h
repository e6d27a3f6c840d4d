// Stored bytes to floats, sixteen at a time. Included by each target.

// Sixteen codes that start at column `col` (a multiple of 16) of a packed row.
template <int Bits>
static inline I codes_at(const uint8_t* row, int64_t plane_bytes, int64_t col) {
  if constexpr (Bits == 8) return unpack8(row + col);
  if constexpr (Bits == 4) return unpack4(row + col / 2);
  if constexpr (Bits == 2) return unpack2(row + col / 4);
  if constexpr (Bits == 3) return add_bit2(unpack2(row + col / 4), row + plane_bytes + col / 8);
}

// The last vector of a row would read past its bytes (and the buffer): it goes through a zeroed
// copy.
template <int Bits>
static inline I codes_at_tail(const uint8_t* row, int64_t plane_bytes, int64_t col, int n) {
  uint8_t copy[32] = {};
  if constexpr (Bits == 3) {
    memcpy(copy, row + col / 4, static_cast<size_t>((n + 3) / 4));
    memcpy(copy + 16, row + plane_bytes + col / 8, static_cast<size_t>((n + 7) / 8));
    return codes_at<3>(copy, 16, 0);
  } else {
    memcpy(copy, row + col * Bits / 8, static_cast<size_t>((n * Bits + 7) / 8));
    return codes_at<Bits>(copy, 0, 0);
  }
}

// Sixteen halves, the absent ones of a short end zero.
static inline F halves_at(const uint16_t* p, int n) {
  if (n >= 16) return load_half(p);
  uint16_t copy[16] = {};
  memcpy(copy, p, sizeof(uint16_t) * static_cast<size_t>(n));
  return load_half(copy);
}

// The values of the codes themselves, as a table: unpack4 may leave bits above a code, which a
// look-up ignores and a conversion would not.
constexpr float kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Scales and zero points of up to kParameters groups of a row, expanded to floats ahead of the loop
// over weights.
constexpr int64_t kParameters = 64;

struct Parameters {
  float scale[kParameters], zero_point[kParameters];
};

// Fills [0, n) from the groups that start at `first`, a multiple of 16.
template <int Bits>
static inline void load_parameters(const PackedView& view, int64_t row, int64_t first, int64_t n,
                                   Parameters* to) {
  constexpr float kMiddle = static_cast<float>(1 << (Bits - 1));
  const int64_t at = row * view.scale_row_stride + first;
  for (int64_t i = 0; i < n; i += 16) {
    const int count = static_cast<int>(n - i < 16 ? n - i : 16);
    switch (view.scale_kind) {
      case ScaleKind::kFp32:
        memcpy(to->scale + i, static_cast<const float*>(view.scale) + at + i,
               sizeof(float) * static_cast<size_t>(count));
        break;
      case ScaleKind::kFp16:
        store(to->scale + i,
              mul(halves_at(static_cast<const uint16_t*>(view.scale) + at + i, count),
                  set1(view.factor)));
        break;
      case ScaleKind::kDoubleQuant: {
        const uint8_t* codes = static_cast<const uint8_t*>(view.scale) + at + i;
        for (int j = 0; j < count; ++j) {
          const float absmax = view.scale_absmax[(at + i + j) / kDoubleQuantBlock];
          to->scale[i + j] = kDynamicMap[codes[j]] * absmax + view.scale_offset;
        }
        break;
      }
      case ScaleKind::kNone:
        store(to->scale + i, set1(1.0f));
        break;
    }
    F zero_point = set1(view.zero_kind == Zero::kMidrise ? kMiddle - 0.5f : kMiddle);
    if (view.zero_kind == Zero::kFloat) {
      zero_point = halves_at(static_cast<const uint16_t*>(view.zero) + at + i, count);
    } else if (view.zero_kind == Zero::kInt) {
      const uint8_t* packed = static_cast<const uint8_t*>(view.zero) + row * view.zero_row_bytes;
      const int64_t plane = Bits == 3 ? (view.groups + 3) / 4 : 0;
      const I code = count == 16 ? codes_at<Bits>(packed, plane, first + i)
                                 : codes_at_tail<Bits>(packed, plane, first + i, count);
      zero_point = Bits == 8 ? to_float(code) : lookup(load(kCodes), code);
    }
    store(to->zero_point + i, zero_point);
  }
}

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
