// Scales and zero points per unit of columns, sixteen at a time. Included by each target.

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

// Zero points of up to sixteen groups of a row from `group`, a multiple of 16.
template <int Bits>
static inline F zeros_of(const PackedView& view, int64_t row, int64_t group, int n) {
  constexpr float kMiddle = static_cast<float>(1 << (Bits - 1));
  if (view.family != Family::kInteger) return zero();
  switch (view.zero_kind) {
    case Zero::kFloat:
      return halves_at(
          static_cast<const uint16_t*>(view.zero) + row * view.scale_row_stride + group, n);
    case Zero::kInt: {
      const uint8_t* packed = static_cast<const uint8_t*>(view.zero) + row * view.zero_row_bytes;
      const int64_t plane = Bits == 3 ? (view.groups + 3) / 4 : 0;
      const I code = n == 16 ? codes_at<Bits>(packed, plane, group)
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

// Whether operands with this offset leave anything to subtract.
template <int Bits>
static inline bool has_shift(const PackedView& view, float offset) {
  if (view.zero_kind == Zero::kInt || view.zero_kind == Zero::kFloat) return true;
  float point[16];
  store(point, zeros_of<Bits>(view, 0, 0, 1));
  return point[0] + offset != 0.0f;
}

// For sixteen units of a row at a time, take(first unit, factors, shifts): a unit's share of the
// product is factor * (integer product) - shift * (sum of its q). `kShifted` says whether shifts are
// wanted. Lanes beyond the row's units hold anything finite.
template <int Bits, bool kShifted, class Take>
static inline void for_each_unit(const PackedView& view, int64_t row, int64_t unit, int64_t units,
                                 const OperandRange& range, const Take& take) {
  const int64_t per_group =
      view.groups == 1 ? (view.cols + unit - 1) / unit : view.group_size / unit;
  const int64_t at = row * view.scale_row_stride;
  const F by = set1(range.factor);
  F iota = zero(), inverse = zero();
  if (per_group > 1) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(i) + 0.5f;
    iota = load(lanes);
    inverse = set1(1.0f / static_cast<float>(per_group));
  }
  for (int64_t group = 0; group < view.groups; group += 16) {
    const int n = static_cast<int>(view.groups - group < 16 ? view.groups - group : 16);
    const F factors = mul(scales_of(view, at + group, n), by);
    F shifts = zero();
    if constexpr (kShifted) {
      shifts = mul(factors, add(zeros_of<Bits>(view, row, group, n), set1(range.offset)));
    }
    if (per_group == 1) {
      take(group, factors, shifts);
      continue;
    }
    const int64_t first = group * per_group;
    for (int64_t u = 0; u < 16 * per_group && first + u < units; u += 16) {
      const I of = to_int(mul(add(iota, set1(static_cast<float>(u))), inverse));
      take(first + u, lookup(factors, of), kShifted ? lookup(shifts, of) : shifts);
    }
  }
}
