// Scales and zero points per unit of columns, sixteen at a time. Included by each target.

// Whether operands with this offset leave anything to subtract.
template <int Bits>
static inline bool has_shift(const PackedView& view, float offset) {
  if (view.zero_kind == Zero::kInt || view.zero_kind == Zero::kFloat) return true;
  float point[16];
  store(point, zeros_of<Bits>(view, 0, 0, 1));
  return point[0] + offset != 0.0f;
}

// For sixteen units of a row at a time, take(first unit, factors, shifts): a unit's share of the
// product is factor * (integer product) - shift * (sum of its q). `kShifted` says whether shifts
// are wanted. Lanes beyond the row's units hold anything finite.
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
    // (u + lane + 0.5) / per_group, rounded down, is the group of each unit; the half keeps
    // rounding away from the edges.
    const int64_t first = group * per_group;
    for (int64_t u = 0; u < 16 * per_group && first + u < units; u += 16) {
      const I of = view.groups == 1 ? zero_i()
                                    : to_int(mul(add(iota, set1(static_cast<float>(u))), inverse));
      take(first + u, lookup(factors, of), kShifted ? lookup(shifts, of) : shifts);
    }
  }
}
