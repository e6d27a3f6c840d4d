// Floats to integers with a scale per span, in the order in which the weights will come. Included
// by each target.

// Lane i is the sum of the lanes of rows[i], sixteen rows; or the largest of them.
static inline F add_lanes(const float* rows) {
  return join_lanes(rows, [](F a, F b) { return add(a, b); });
}
static inline F max_lanes(const float* rows) {
  return join_lanes(rows, [](F a, F b) { return max(a, b); });
}

// Spans of units, of sixteen, and which of them share a scale (at their first unit).
struct Spans {
  int64_t units;
  const uint8_t* shared;

  // What `join` makes of the lanes of each, in all of them; a lane is a unit.
  template <class Join>
  F joined(F of_units, const Join& join) const {
    if (units == 1) return of_units;
    float lanes[16];
    store(lanes, of_units);
    for (int64_t first = 0; first < 16; first += units) {
      if (!shared[first]) continue;
      float all = lanes[first];
      for (int64_t u = first + 1; u < first + units; ++u) all = join(all, lanes[u]);
      for (int64_t u = first; u < first + units; ++u) lanes[u] = all;
    }
    return load(lanes);
  }
};

// The first `live` of sixteen units: q[0, live * unit), and for all sixteen scales and sums of the
// integers. Side by side, since each alone would wait for its own sums. False where integers cannot
// stand for one.
template <int kUnit>
static inline bool quantize_units(const float* x, int64_t live, const Spans& spans, float limit,
                                  float sum_limit, int32_t* q, float* scale, float* sum) {
  alignas(64) float largest[16 * 16], totals[16 * 16], integers[16 * 16];
  for (int64_t u = live; u < 16; ++u) {
    store(largest + 16 * u, zero());
    store(totals + 16 * u, zero());
    store(integers + 16 * u, zero());
  }
  for (int64_t u = 0; u < live; ++u) {
    F most = zero(), total = zero();
#pragma GCC unroll 4
    for (int64_t i = u * kUnit; i < (u + 1) * kUnit; i += 16) {
      const F v = abs(load(x + i));
      most = max(v, most);
      total = add(total, v);
    }
    store(largest + 16 * u, most);
    store(totals + 16 * u, total);
  }
  const F absmax = spans.joined(max_lanes(largest), [](float a, float b) { return a > b ? a : b; });
  const F abssum = spans.joined(add_lanes(totals), [](float a, float b) { return a + b; });
  float most[16], total[16];
  store(most, absmax);
  store(total, abssum);
  for (int i = 0; i < 16; ++i) {
    if (!(total[i] < kMostActivation)) return false;  // or NaN
    if (total[i] != 0.0f && most[i] < kLeastActivation) return false;
  }
  const F step = max(div(absmax, set1(limit)), div(abssum, set1(sum_limit)));
  // Units of zeros divide by one: their scale is zero, and so is q.
  float inverse[16];
  store(inverse, div(set1(1.0f), select_above(abssum, zero(), step, set1(1.0f))));
  store(scale, step);
  for (int64_t u = 0; u < live; ++u) {
    const F by = set1(inverse[u]);
    F all = zero();
#pragma GCC unroll 4
    for (int64_t i = u * kUnit; i < (u + 1) * kUnit; i += 16) {
      const F rounded = round_even(mul(load(x + i), by));
      all = add(all, rounded);
      store_i(q + i, to_int(rounded));
    }
    store(integers + 16 * u, all);
  }
  store(sum, mul(step, add_lanes(integers)));
  return true;
}

// 64 columns of q in the order in which a lane takes them: a slab of words, of bytes, or of high
// bytes and another of low ones.
struct Slab {
  uint8_t* high;  // words and bytes too
  uint8_t* low;
};
static inline void place_slab(const ActivationLayout& layout, const int32_t* q, const Slab& to) {
  if (layout.operand == Operand::kWords) return place_words(q, layout.order, to.high);
  if (layout.operand == Operand::kBytes) return place_bytes(q, layout.order, to.high);
  int32_t high[64], low[64];
  for (int i = 0; i < 64; ++i) {  // q = 256 * high + low, both signed bytes
    high[i] = (q[i] + 128) >> 8;
    low[i] = q[i] - 256 * high[i];
  }
  place_bytes(high, layout.order, to.high);
  place_bytes(low, layout.order, to.low);
}

// What lane i of the kernel's vectors meets, one after the other, lies together at its first
// column: column by column of a transposition it becomes vectors. `out`: every `stride` bytes.
static inline void place_block(const ActivationLayout& layout, const uint8_t* slabs, int64_t stride,
                               uint8_t* out) {
  const int64_t width = layout.operand == Operand::kWords ? 2 : 1;
  const int64_t vectors = layout.block_cols * width / 64;
  for (int64_t first = 0; first < vectors; first += 16) {
    I lanes[16];
    for (int i = 0; i < 16; ++i)
      lanes[i] = load_i(slabs + layout.first_col_of_lane[i] * width + 4 * first);
    transpose(lanes);
    for (int64_t v = 0; v < 16 && first + v < vectors; ++v)
      store_i(out + (first + v) * stride, lanes[v]);
  }
}

// Row `m` of `to` from `source` [cols]. False where it holds what integers cannot stand for.
static bool quantize_activations(const void* source, FloatType dtype, int64_t m, Activations* to) {
  const ActivationLayout& layout = *to->layout;
  const int64_t slab_bytes = layout.operand == Operand::kWords ? 128 : 64;
  const int64_t stretch = 16 * to->unit, width = dtype == FloatType::kFloat32 ? 4 : 2;
  alignas(64) float x[kMaxBlockCols];
  alignas(64) int32_t q[kMaxBlockCols];
  // What the last lanes read, and do not use, lies behind the block.
  alignas(64) uint8_t slabs[2][2 * kMaxBlockCols + 64];
  for (int64_t u = 0, col = 0; u < to->units; u += 16, col += stretch) {
    const int64_t left = to->cols - col, n = left < 0 ? 0 : left < stretch ? left : stretch;
    const int64_t live = (n + 63) / 64 * 64 / to->unit;  // whole slabs
    const void* from = static_cast<const char*>(source) + col * width;
    const float* floats = static_cast<const float*>(from);
    if (dtype != FloatType::kFloat32 || n < live * to->unit) {
      span_to_float(from, dtype, n, x);
      for (int64_t i = n; i < live * to->unit; ++i) x[i] = 0.0f;
      floats = x;
    }
    const auto quantize = to->unit == 64   ? quantize_units<64>
                          : to->unit == 32 ? quantize_units<32>
                                           : quantize_units<16>;
    const int64_t at_units = m * to->units + u;
    const Spans spans{to->span / to->unit, to->shared ? to->shared + u : nullptr};
    if (!quantize(floats, live, spans, to->limit, to->sum_limit, q, to->scale + at_units,
                  to->sum + at_units))
      return false;
    for (int64_t at = 0; at < stretch && col + at < to->cols; at += layout.block_cols) {
      const int64_t b = (col + at) / layout.block_cols;
      uint8_t* out = to->data + (b * to->rows + m) * layout.block_bytes;
      if (!layout.turned) {
        place_slab(layout, q + at, {out, out + 64});
        continue;
      }
      for (int64_t i = 0; i < layout.block_cols; i += 64) {
        uint8_t *high = slabs[0] + i / 64 * slab_bytes, *low = slabs[1] + i / 64 * slab_bytes;
        if (at + i < live * to->unit) {
          place_slab(layout, q + at + i, {high, low});
        } else {
          memset(high, 0, static_cast<size_t>(slab_bytes));
          memset(low, 0, static_cast<size_t>(slab_bytes));
        }
      }
      const bool two = layout.operand == Operand::kTwoBytes;
      place_block(layout, slabs[0], two ? 128 : 64, out);
      if (two) place_block(layout, slabs[1], 128, out + 64);
    }
  }
  return true;
}
