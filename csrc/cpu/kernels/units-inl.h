// Scales and zero points per unit of columns, for some rows of a weight at a time: their scales are
// stored one after the other, and decoded so. Included by each target.

// Whether operands with this offset leave anything to subtract.
template <int Bits>
static inline bool has_shift(const PackedView& view, float offset) {
  if (view.zero_kind == Zero::kInt || view.zero_kind == Zero::kFloat) return true;
  float point[16];
  store(point, zeros_of<Bits>(view, 0, 0, 1));
  return point[0] + offset != 0.0f;
}

// out[i] = the scale at + i times `by`, i < count, of double-quantized ones; up to 31 floats after
// them are written too.
static inline void load_coded_scales(const PackedView& view, int64_t at, int64_t count, float by,
                                     float* out) {
  const WideTable map = wide_table(kDynamicMap);
  const uint8_t* codes = static_cast<const uint8_t*>(view.scale) + at;
  const F offset = set1(view.scale_offset), factor = set1(by);
  uint8_t rest[32] = {};
  for (int64_t i = 0; i < count;) {
    const int64_t block = (at + i) / kDoubleQuantBlock;
    int64_t end = (block + 1) * kDoubleQuantBlock - at;
    if (end > count) end = count;
    const F absmax = set1(view.scale_absmax[block]);
    for (; i < end; i += 32) {
      const uint8_t* from = codes + i;
      if (count - i < 32)
        from = static_cast<uint8_t*>(memcpy(rest, from, static_cast<size_t>(count - i)));
      F value[2];
      lookup_wide(map, from, value);
      // Rounded as where a scale is decoded alone: near zero the last bit is all that is left.
      for (int half = 0; half < 2; ++half)
        store(out + i + 16 * half, mul(add(mul(value[half], absmax), offset), factor));
    }
    i = end;  // what was written beyond is the next block's
  }
}

// out[i] = the scale at + i times `by`, i < count, and 64 zeros after them.
static inline void load_scales(const PackedView& of, int64_t at, int64_t count, float by,
                               float* out) {
  const PackedView view = of;  // what is stored to out cannot change a copy
  if (view.scale_kind == ScaleKind::kDoubleQuant) {
    load_coded_scales(view, at, count, by, out);
  } else {
    for (int64_t i = 0; i < count; i += 16) {
      const int n = static_cast<int>(count - i < 16 ? count - i : 16);
      store_part(out + i, mul(scales_of(view, at + i, n), set1(by)), n);
    }
  }
  for (int64_t i = 0; i < 64; i += 16) store(out + count + i, zero());
}

// Floats that load_units decodes into: scales of `rows` rows and the zero points of one.
static inline int64_t decoded_floats(const PackedView& view, int64_t rows) {
  return (rows + 1) * view.groups + 96;
}
// And those it leaves, as they are read: a vector beyond the last unit.
static inline int64_t unit_floats(const Activations& x, int64_t rows) {
  return rows * x.units + 64;
}

// Values of groups for sixteen units at a time, `per_group` of which share one.
struct Spread {
  int64_t per_group, groups;
  F middle, inverse;

  Spread(int64_t per_group, int64_t groups) : per_group(per_group), groups(groups) {
    float middles[16];
    for (int i = 0; i < 16; ++i) middles[i] = static_cast<float>(i) + 0.5f;
    middle = load(middles);
    inverse = set1(1.0f / static_cast<float>(per_group));
  }
  // of[(u + lane) / per_group]; sixteen beyond the last group are read.
  F at(const float* of, int64_t u) const {
    if (per_group == 1) return load(of + u);
    if (groups == 1) return set1(of[0]);
    // (u + 0.5) / per_group, rounded down, is the group of a unit; the half keeps rounding away
    // from the edges.
    const int64_t group = u / per_group;
    const F past = set1(static_cast<float>(u - group * per_group));
    return lookup(load(of + (group < groups ? group : 0)), to_int(mul(add(middle, past), inverse)));
  }
};

// Has what load_units will read of the rows from `row` on brought near, far ahead of that.
static inline void ask_for_units(const PackedView& view, int64_t row, int64_t rows) {
  if (view.scale_row_stride == 0 || view.scale_kind == ScaleKind::kNone || row >= view.rows) return;
  const auto ask = [](const void* from, int64_t begin, int64_t bytes) {
    const uint8_t* first = static_cast<const uint8_t*>(from) + begin;
    for (int64_t at = 0; at < bytes; at += 64) prefetch_far(first + at);
  };
  const int64_t width = view.scale_kind == ScaleKind::kFp32   ? 4
                        : view.scale_kind == ScaleKind::kFp16 ? 2
                                                              : 1;
  ask(view.scale, row * view.groups * width, rows * view.groups * width);
  if (view.scale_kind == ScaleKind::kDoubleQuant)
    prefetch_far(view.scale_absmax + row * view.groups / kDoubleQuantBlock);
  if (view.zero_kind == Zero::kFloat) ask(view.zero, row * view.groups * 2, rows * view.groups * 2);
  if (view.zero_kind == Zero::kInt)
    ask(view.zero, row * view.zero_row_bytes, rows * view.zero_row_bytes);
}

// Of `rows` rows of a weight from `row`: a unit's share of the product is
//   factor * (integer product) + shift * (sum of its q).
// factors, shifts (null where none are wanted): [rows][units]; zero beyond a row's end, where
// another row's may be read first, and theirs need not be finite.
// `ranges`: of each row; `decoded`: decoded_floats of scratch. Never inlined: it is called amid
// loops that fill the registers.
template <int Bits>
[[gnu::noinline]] static void load_units(const PackedView& of, int64_t row, int64_t rows,
                                         int64_t unit, int64_t units, const OperandRange* ranges,
                                         float* decoded, float* factors, float* shifts) {
  const PackedView view = of;  // what is stored to factors cannot change a copy
  const int64_t groups = view.groups, used = (view.cols + unit - 1) / unit;
  const bool of_tensor = view.scale_row_stride == 0;
  const Spread spread(groups == 1 ? units : view.group_size / unit, groups);
  const int64_t count = of_tensor ? 1 : rows * groups;
  // Where groups are units and leave no gaps, scales are factors as they lie.
  const bool as_they_lie =
      spread.per_group == 1 && units == groups && !of_tensor && !has_own_levels(view);
  load_scales(view, row * view.scale_row_stride, count, as_they_lie ? ranges[0].factor : 1.0f,
              as_they_lie ? factors : decoded);
  if (as_they_lie) {
    const F offset = set1(-ranges[0].offset);
    for (int64_t j = 0; shifts && j < rows; ++j) {
      for (int64_t u = 0; u < units; u += 16) {
        const int64_t i = j * units + u;
        store(shifts + i,
              mul(load(factors + i), sub(offset, zeros_of<Bits>(view, row + j, u, 16))));
      }
    }
    return;
  }
  float* zeros = decoded + count + 64;
  // Lanes beyond the row become zeros, whatever they were.
  const auto used_of = [used](int64_t u, F v) {
    const int64_t left = used - u;
    return left >= 16 ? v : select_lanes((1 << left) - 1, v, zero());
  };
  for (int64_t j = 0; j < rows; ++j) {
    const F by = set1(ranges[j].factor), offset = set1(-ranges[j].offset);
    const float* scales = decoded + (of_tensor ? 0 : j * groups);
    const auto zeros_at = [&](int64_t group) {
      const int64_t left = groups - group;
      return zeros_of<Bits>(view, row + j, group, static_cast<int>(left < 16 ? left : 16));
    };
    if (shifts && spread.per_group > 1)
      for (int64_t group = 0; group < groups; group += 16) store(zeros + group, zeros_at(group));
    for (int64_t u = 0; u < units; u += 16) {
      F factor = zero(), shift = zero();
      if (u < used) {
        factor = used_of(u, mul(spread.at(scales, u), by));
        if (shifts) {
          const F point = spread.per_group > 1 ? spread.at(zeros, u) : zeros_at(u);
          shift = mul(factor, used_of(u, sub(offset, point)));
        }
      }
      store(factors + j * units + u, factor);
      if (shifts) store(shifts + j * units + u, shift);
    }
  }
}
