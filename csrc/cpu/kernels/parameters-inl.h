// Codes, scales and zero points as they are stored, sixteen at a time. Included by each target.

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

// Scales of up to sixteen groups from the `at`-th on; lanes beyond are finite.
static inline F scales_of(const PackedView& view, int64_t at, int n) {
  switch (view.scale_kind) {
    case ScaleKind::kFp32:
      return n == 16 ? load(static_cast<const float*>(view.scale) + at)
                     : load_part(static_cast<const float*>(view.scale) + at, n);
    case ScaleKind::kFp16:
      return mul(halves_at(static_cast<const uint16_t*>(view.scale) + at, n), set1(view.factor));
    case ScaleKind::kDoubleQuant: {
      const uint8_t* codes = static_cast<const uint8_t*>(view.scale) + at;
      uint8_t copy[16] = {};
      if (n < 16) memcpy(copy, codes, static_cast<size_t>(n));
      const F value = pick(kDynamicMap, n < 16 ? copy : codes);
      const int64_t block = at / kDoubleQuantBlock;
      F absmax = set1(view.scale_absmax[block]);
      if ((at + n - 1) / kDoubleQuantBlock != block) {
        float each[16] = {};
        for (int i = 0; i < n; ++i) each[i] = view.scale_absmax[(at + i) / kDoubleQuantBlock];
        absmax = load(each);
      }
      return add(mul(value, absmax), set1(view.scale_offset));
    }
    case ScaleKind::kNone:
      break;
  }
  return set1(1.0f);
}

// Bytes from a row of zero points that sixteen from `group` on reach to, `plane` the bytes of the
// first plane of 3-bit ones.
template <int Bits>
static inline int64_t zeros_end(int64_t plane, int64_t group) {
  if constexpr (Bits != 3) return (group + 16) * Bits / 8;
  const int64_t low = (group + 16) / 4, third = plane + (group + 16) / 8;
  return low > third ? low : third;
}

// Zero points of up to sixteen groups of a row from `group`, a multiple of 16. Those of a short end
// are loaded like others where rows follow; lanes beyond it hold anything.
template <int Bits>
static inline F zeros_of(const PackedView& view, int64_t row, int64_t group, int n) {
  constexpr float kMiddle = static_cast<float>(1 << (Bits - 1));
  if (view.family != Family::kInteger) return zero();
  switch (view.zero_kind) {
    case Zero::kFloat: {
      const bool whole = (view.rows - row) * view.scale_row_stride >= group + 16;
      return halves_at(
          static_cast<const uint16_t*>(view.zero) + row * view.scale_row_stride + group,
          whole ? 16 : n);
    }
    case Zero::kInt: {
      const uint8_t* packed = static_cast<const uint8_t*>(view.zero) + row * view.zero_row_bytes;
      const int64_t plane = Bits == 3 ? (view.groups + 3) / 4 : 0;
      const bool whole = (view.rows - row) * view.zero_row_bytes >= zeros_end<Bits>(plane, group);
      const I code = whole ? codes_at<Bits>(packed, plane, group)
                           : codes_at_tail<Bits>(packed, plane, group, n);
      return Bits == 8 ? to_float(code) : lookup(load(kCodes), code);
    }
    case Zero::kMidrise:
      return set1(kMiddle - 0.5f);
    case Zero::kNone:
      break;
  }
  return set1(kMiddle);
}

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
  const int64_t at = row * view.scale_row_stride + first;
  for (int64_t i = 0; i < n; i += 16) {
    const int count = static_cast<int>(n - i < 16 ? n - i : 16);
    store(to->scale + i, scales_of(view, at + i, count));
    store(to->zero_point + i, zeros_of<Bits>(view, row, first + i, count));
  }
}
