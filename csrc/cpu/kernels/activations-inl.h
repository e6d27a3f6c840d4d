// Floats to integers with a scale per unit, in the order in which the weights will come. Included
// by each target.

// Activations beyond these leave scales, or their products with the scales of weights, too near the
// ends of what a float can hold. They, and infinite or NaN ones, are left to fp32 arithmetic.
constexpr float kLeastActivation = 1e-25f, kMostActivation = 1e30f;

// One unit: q[0, unit) and its scale. False where integers cannot stand for it.
static inline bool quantize_unit(const float* x, int64_t unit, float limit, float sum_limit,
                                 int32_t* q, float* scale, float* sum) {
  F largest = zero(), total = zero();
  for (int64_t i = 0; i < unit; i += 16) {
    const F v = abs(load(x + i));
    largest = max(v, largest);
    total = add(total, v);
  }
  const float absmax = reduce_max(largest);
  const float abssum = reduce_add(total);
  if (!(abssum < kMostActivation)) return false;
  if (abssum == 0.0f) {
    memset(q, 0, sizeof(int32_t) * static_cast<size_t>(unit));
    *scale = *sum = 0.0f;
    return true;
  }
  if (absmax < kLeastActivation) return false;
  const float by_limit = absmax / limit, by_sum = abssum / sum_limit;
  const float step = by_limit > by_sum ? by_limit : by_sum;
  const F inverse = set1(1.0f / step);
  F integers = zero();
  for (int64_t i = 0; i < unit; i += 16) {
    const F rounded = round_even(mul(load(x + i), inverse));
    integers = add(integers, rounded);
    store_i(q + i, to_int(rounded));
  }
  *scale = step;
  *sum = step * reduce_add(integers);
  return true;
}

// Row `m` of `to` from `source` [cols]. False where it holds what integers cannot stand for.
static bool quantize_activations(const void* source, FloatType dtype, int64_t m, Activations* to) {
  const ActivationLayout& layout = *to->layout;
  const int64_t width = dtype == FloatType::kFloat32 ? 4 : 2;
  const int64_t block = layout.block_cols;
  float x[kMaxBlockCols];
  int32_t q[kMaxBlockCols];
  float* scale = to->scale + m * to->units;
  float* sum = to->sum + m * to->units;
  for (int64_t b = 0; b < to->blocks; ++b) {
    const int64_t col = b * block;
    const int64_t n = to->cols - col < block ? to->cols - col : block;
    span_to_float(static_cast<const char*>(source) + col * width, dtype, n, x);
    for (int64_t i = n; i < block; ++i) x[i] = 0.0f;
    for (int64_t i = 0; i < block; i += to->unit) {
      if (!quantize_unit(x + i, to->unit, to->limit, to->sum_limit, q + i, scale++, sum++))
        return false;
    }
    uint8_t* out = to->data + (b * to->rows + m) * layout.block_bytes;
    if (layout.operand == Operand::kWords) {
      place_words(q, layout.order, block, out);
    } else if (layout.operand == Operand::kBytes) {
      for (int64_t i = 0; i < block; ++i) out[i] = static_cast<uint8_t>(q[layout.order[i]]);
    } else {
      // A vector of high bytes, then one of low bytes, in turn.
      for (int64_t i = 0; i < block; ++i) {
        const int32_t value = q[layout.order[i]] + 128;
        uint8_t* pair = out + (i / 64) * 128 + i % 64;
        pair[0] = static_cast<uint8_t>(value >> 8);
        pair[64] = static_cast<uint8_t>((value & 0xff) - 128);
      }
    }
  }
  for (int64_t u = scale - (to->scale + m * to->units); u < to->units; ++u) {
    *scale++ = 0.0f;
    *sum++ = 0.0f;
  }
  return true;
}
