// Residuals of sixteen spans under a norm |r|^p, as half-quadratic quantization wants them.
// Included by each target, after quantize-inl.h.

// log2 of positive normal x, to 1.3e-5: a minimax polynomial of the mantissa in [1, 2).
static inline F log2_of(F x) {
  const F m = mantissa_of(x);
  F y = set1(0.044873589f);
  for (float coefficient :
       {-0.416563528f, 1.631148297f, -3.550792249f, 5.091710328f, -2.800363899f})
    y = add(mul(y, m), set1(coefficient));
  return add(exponent_of(x), y);
}

// 2^x for x in [-126, 127], to 3e-6 relative: a minimax polynomial of what is left of x by
// rounding.
static inline F exp2_of(F x) {
  const F whole = round_even(x), rest = sub(x, whole);
  F y = set1(0.009570102f);
  for (float coefficient : {0.055917860f, 0.240247448f, 0.693121815f, 0.999999261f})
    y = add(mul(y, rest), set1(coefficient));
  return mul(y, power_of_two(whole));
}

static void shrink(int bits, const float* block, int64_t n, const float* scale,
                   const float* zero_point, float p, float beta, ShrinkSums* sums) {
  // Long spans are summed in parts, so that a sum stays near its terms in size.
  constexpr int64_t kPart = 256;
  const F inverse = inverses_of(load(scale)), zeros = load(zero_point);
  const F top = set1(static_cast<float>((1 << bits) - 1)), none = zero();
  const F power = set1(p - 2.0f);
  F offset = none;  // -log2(beta)
  offset = sub(offset, log2_of(set1(beta)));
  const F least = set1(1e-30f), most = set1(1e30f), floor = set1(-126.0f);
  F error = none, pull = none;
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t last = first + kPart < n ? first + kPart : n;
    F part_error = none, part_pull = none;
    for (int64_t j = first; j < last; ++j) {
      const F at = add(mul(load(block + 16 * j), inverse), zeros);
      const F r = sub(at, clamp_code(round_even(at), top));
      const F size = abs(r);
      const F log = log2_of(min(max(size, least), most));
      // min(1, |r|^(p - 2) / beta)
      const F factor = exp2_of(max(min(add(mul(power, log), offset), none), floor));
      part_error = add(part_error, size);
      part_pull = add(part_pull, mul(r, factor));
    }
    error = add(error, part_error);
    pull = add(pull, part_pull);
  }
  store(sums->error, error);
  store(sums->pull, pull);
}
