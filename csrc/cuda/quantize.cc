#include "cuda/quantize.h"

namespace bitfold::cuda {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Where things lie in the scratch memory of one call.
struct Scratch {
  int64_t scale, zero, parts, low, high, bytes;
};

Scratch scratch_of(const Format& format, int64_t rows, int64_t cols) {
  const int64_t floats = aligned(spans_of(format, rows, cols).count() * 4);
  const int64_t of_rows = format.grouping == Grouping::kTensor ? aligned(rows * 4) : 0;
  Scratch at{};
  at.zero = at.scale + floats;
  at.parts = at.zero + floats;
  at.low = at.parts + aligned(kParts * static_cast<int64_t>(sizeof(ScalePart)));
  at.high = at.low + of_rows;
  at.bytes = at.high + of_rows;
  return at;
}

// One fold: sizes, where things go, and the scales and zero points on their way there.
struct Fold {
  const Format& format;
  const MatrixView& w;
  const FoldBuffers to;
  const Spans spans;
  const DeviceEncoding encoding;
  float *scale, *zero, *low, *high;
  ScalePart* parts;

  Fold(const Format& stored, const MatrixView& weight, void* const* buffers, void* scratch)
      : format(stored),
        w(weight),
        to(stored, weight.rows, weight.cols, buffers),
        spans(spans_of(stored, weight.rows, weight.cols)),
        encoding(make_encoding(stored)) {
    const Scratch at = scratch_of(stored, weight.rows, weight.cols);
    const auto region = [&](int64_t offset) { return static_cast<char*>(scratch) + offset; };
    scale = stores_floats(stored) ? to.get<float>(BufferRole::kScale)
                                  : reinterpret_cast<float*>(region(at.scale));
    zero = reinterpret_cast<float*>(region(at.zero));
    low = reinterpret_cast<float*>(region(at.low));
    high = reinterpret_cast<float*>(region(at.high));
    parts = reinterpret_cast<ScalePart*>(region(at.parts));
  }

  Status choose(Method method, cudaStream_t stream) const {
    if (method == Method::kSearch)
      return search_scales(w, spans, encoding, {}, scale, zero, stream);
    if (format.grouping == Grouping::kTensor)
      return round_tensor_scale(w, encoding, {}, low, high, scale, zero, stream);
    return round_scales(w, spans, encoding, {}, scale, zero, stream);
  }
  Status store(bool exactly, cudaStream_t stream) const {
    if (stores_halves(format)) {
      if (Status status = sum_scales(scale, spans.count(), parts, stream); !status.ok())
        return status;
    }
    return store_scales(format, spans, encoding, to, exactly, /*known=*/false, scale, zero, parts,
                        stream);
  }
};

}  // namespace

Spans spans_of(const Format& format, int64_t rows, int64_t cols) {
  return {format.groups_per_row(cols),
          format.grouping == Grouping::kGroup ? format.group_size : cols, format.scale_rows(rows)};
}

FoldBuffers::FoldBuffers(const Format& format, int64_t rows, int64_t cols, void* const* buffers) {
  size_t i = 0;
  for (const BufferSpec& spec : format.buffers(rows, cols))
    of_role[static_cast<size_t>(spec.role)] = buffers[i++];
}

Status store_scales(const Format& format, const Spans& spans, const DeviceEncoding& encoding,
                    const FoldBuffers& to, bool exactly, bool known, float* scale, float* zero,
                    ScalePart* parts, cudaStream_t stream) {
  const int64_t n = spans.count();
  if (format.double_quant) {
    if (Status status = sum_scales(scale, n, parts, stream); !status.ok()) return status;
    float* following = format.zero == Zero::kFloat ? zero : nullptr;
    if (Status status = store_double_quantized(
            parts, n, format.bits(), scale, exactly ? nullptr : scale, following,
            to.get<uint8_t>(BufferRole::kScale), to.get<float>(BufferRole::kScaleAbsmax),
            to.get<float>(BufferRole::kScaleOffset), stream);
        !status.ok())
      return status;
  } else if (stores_halves(format)) {
    if (Status status =
            store_halves(known ? nullptr : parts, n, scale, to.get<uint16_t>(BufferRole::kScale),
                         to.get<int8_t>(BufferRole::kExponent), stream);
        !status.ok())
      return status;
  }
  if (format.zero != Zero::kInt && format.zero != Zero::kFloat) return Status::success();
  return store_zeros(spans, encoding, zero, to.get<void>(BufferRole::kZero), stream);
}

bool can_quantize(const Format& format, Method method) {
  return format.family() != Family::kLearnedCodebook && format.outliers == 0 &&
         !(format.grouping == Grouping::kTensor && method == Method::kSearch);
}

int64_t quantize_scratch_bytes(const Format& format, int64_t rows, int64_t cols) {
  return scratch_of(format, rows, cols).bytes;
}

Status quantize(const Format& format, Method method, const MatrixView& w, void* const* buffers,
                void* scratch, cudaStream_t stream) {
  const Fold fold(format, w, buffers, scratch);
  auto* codes = fold.to.get<uint8_t>(BufferRole::kCodes);
  // A codebook with absmax scales is encoded against the exact absmax, as bitsandbytes does.
  const bool exactly = fold.encoding.book && method == Method::kRound;
  if (exactly && can_fold(w, fold.spans, fold.encoding)) {
    if (Status status = fold_rows(w, fold.spans, fold.encoding, fold.scale, codes, stream);
        !status.ok())
      return status;
    return fold.store(exactly, stream);
  }
  Status status = fold.choose(method, stream);
  if (status.ok()) status = fold.store(exactly, stream);
  if (status.ok())
    status = encode_rows(w, fold.spans, fold.encoding, fold.scale, fold.zero, codes, stream);
  return status;
}

Status hqq(const Format& format, const HqqSteps& steps, const MatrixView& w, void* const* buffers,
           void* scratch, cudaStream_t stream) {
  const Fold fold(format, w, buffers, scratch);
  Status status = fold.choose(Method::kSearch, stream);
  if (status.ok()) status = fold.store(/*exactly=*/false, stream);
  if (status.ok())
    status = shrink_zeros(w, fold.spans, fold.encoding, steps, fold.scale, fold.zero, stream);
  if (status.ok())
    status = store_zeros(fold.spans, fold.encoding, fold.zero, fold.to.get<void>(BufferRole::kZero),
                         stream);
  if (status.ok())
    status = encode_rows(w, fold.spans, fold.encoding, fold.scale, fold.zero,
                         fold.to.get<uint8_t>(BufferRole::kCodes), stream);
  return status;
}

Status double_quantize(const float* scales, int64_t n, void* scratch, uint8_t* codes, float* absmax,
                       float* offset, cudaStream_t stream) {
  auto* parts = static_cast<ScalePart*>(scratch);
  if (Status status = sum_scales(scales, n, parts, stream); !status.ok()) return status;
  return store_double_quantized(parts, n, 8, scales, nullptr, nullptr, codes, absmax, offset,
                                stream);
}

int64_t double_quantize_scratch_bytes() { return kParts * static_cast<int64_t>(sizeof(ScalePart)); }

}  // namespace bitfold::cuda
