// What a target exports. Included last.

// take(codec, operand) with the codec that w's codes and the operand ask for. Codebooks have no
// 8-bit form, and no operand of two bytes: their levels are not the codes.
template <int Bits, class Take>
static inline void with_codec_of(const PackedView& w, Operand operand, const Take& take) {
  if (operand == Operand::kWords) return take(WordCodec<Bits>());
  if constexpr (Bits < 8) {
    if (w.family != Family::kInteger) return take(ByteCodec<Bits, true>());
  }
  take(ByteCodec<Bits, false>());
}
template <class Take>
static inline void with_codec(const PackedView& w, Operand operand, const Take& take) {
  switch (w.bits) {
    case 8:
      return with_codec_of<8>(w, operand, take);
    case 4:
      return with_codec_of<4>(w, operand, take);
    case 3:
      return with_codec_of<3>(w, operand, take);
    case 2:
      return with_codec_of<2>(w, operand, take);
    default:
      __builtin_trap();
  }
}

static void multiply_rows(const PackedView& w, const Activations& x, int64_t begin, int64_t end,
                          void* scratch, float* y, int64_t ldy) {
  const Operand operand = x.layout->operand;
  with_codec(w, operand, [&](auto codec) {
    using Codec = decltype(codec);
    if constexpr (Codec::kWords) {
      multiply_rows_of<Codec, Operand::kWords>(w, x, begin, end, scratch, y, ldy);
    } else {
      if constexpr (!Codec::kTable) {
        if (operand == Operand::kTwoBytes)
          return multiply_rows_of<Codec, Operand::kTwoBytes>(w, x, begin, end, scratch, y, ldy);
      }
      multiply_rows_of<Codec, Operand::kBytes>(w, x, begin, end, scratch, y, ldy);
    }
  });
}

static void mark_shared_spans(const PackedView& w, const Activations& x) {
  with_codec(w, Operand::kWords, [&](auto codec) { mark_spans_of<decltype(codec)::kBits>(w, x); });
}

static void multiply_panel(const PackedView& w, const Activations& x, int64_t row, void* scratch,
                           float* y) {
  with_codec(w, x.layout->operand,
             [&](auto codec) { multiply_panel_with<decltype(codec)>(w, x, row, scratch, y); });
}

const KernelTable table = {
    .stats = stats,
    .choices = choices,
    .interleave = interleave,
    .errors = errors,
    .best_choice = best_choice,
    .fit = fit,
    .weighted_errors = weighted_errors,
    .weighted_fit = weighted_fit,
    .feed_back = feed_back,
    .shrink = shrink,
    .encode = encode,
    .decode = decode,
    .decode_row = decode_row,
    .to_float = span_to_float,
    .from_float = span_from_float,
    .rows_from_float = rows_from_float,
    .gemm_nt = gemm_nt,
    .gemm_nn = gemm_nn,
    .quantize_activations = quantize_activations,
    .mark_shared_spans = mark_shared_spans,
    .walked_rows = kWalkedRows,
    .multiply_rows = multiply_rows,
    .rows_scratch_bytes = rows_scratch_bytes,
    .panel_rows = kTileWidth,
    .multiply_panel = multiply_panel,
    .panel_scratch_bytes = panel_scratch_bytes,
    .add_outliers = add_outliers,
    .dot_codes = dot_codes,
    .bfloat16 = nullptr,
};
