#include "cuda/quantize.h"

#include <array>

#include "cuda/kernels.h"

namespace bitfold::cuda {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

Spans spans_of(const Format& format, int64_t rows, int64_t cols) {
  return {format.groups_per_row(cols),
          format.grouping == Grouping::kGroup ? format.group_size : cols, format.scale_rows(rows)};
}

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

// Buffers by what they are.
struct Buffers {
  std::array<void*, 16> of_role{};
  Buffers(const Format& format, int64_t rows, int64_t cols, void* const* buffers) {
    size_t i = 0;
    for (const BufferSpec& spec : format.buffers(rows, cols))
      of_role[static_cast<size_t>(spec.role)] = buffers[i++];
  }
  template <class T>
  T* get(BufferRole role) const {
    return static_cast<T*>(of_role[static_cast<size_t>(role)]);
  }
};

Status store(const Format& format, const Spans& spans, const DeviceEncoding& encoding,
             const Buffers& to, bool exactly, float* scale, float* zero, ScalePart* parts,
             cudaStream_t stream) {
  const int64_t n = spans.count();
  if (format.family() == Family::kInteger || format.double_quant) {
    if (Status status = sum_scales(scale, n, parts, stream); !status.ok()) return status;
  }
  if (format.double_quant) {
    float* following = format.zero == Zero::kFloat ? zero : nullptr;
    if (Status status = store_double_quantized(
            parts, n, format.bits(), scale, exactly ? nullptr : scale, following,
            to.get<uint8_t>(BufferRole::kScale), to.get<float>(BufferRole::kScaleAbsmax),
            to.get<float>(BufferRole::kScaleOffset), stream);
        !status.ok())
      return status;
  } else if (format.family() == Family::kInteger) {
    if (Status status = store_halves(parts, n, scale, to.get<uint16_t>(BufferRole::kScale),
                                     to.get<int8_t>(BufferRole::kExponent), stream);
        !status.ok())
      return status;
  }
  if (format.zero != Zero::kInt && format.zero != Zero::kFloat) return Status::success();
  return store_zeros(spans, encoding, zero, to.get<void>(BufferRole::kZero), stream);
}

}  // namespace

bool can_quantize(const Format& format, Method method) {
  return format.family() != Family::kLearnedCodebook && format.outliers == 0 &&
         !(format.grouping == Grouping::kTensor && method == Method::kSearch);
}

int64_t quantize_scratch_bytes(const Format& format, int64_t rows, int64_t cols) {
  return scratch_of(format, rows, cols).bytes;
}

Status quantize(const Format& format, Method method, const MatrixView& w, void* const* buffers,
                void* scratch, cudaStream_t stream) {
  const Buffers to(format, w.rows, w.cols, buffers);
  const Spans spans = spans_of(format, w.rows, w.cols);
  const Scratch at = scratch_of(format, w.rows, w.cols);
  const DeviceEncoding encoding = make_encoding(format);
  const auto region = [&](int64_t offset) { return static_cast<char*>(scratch) + offset; };
  auto* zero = reinterpret_cast<float*>(region(at.zero));
  auto* parts = reinterpret_cast<ScalePart*>(region(at.parts));
  // fp32 scales are what they are: chosen in place.
  const bool in_place = format.family() == Family::kFixedCodebook && !format.double_quant;
  auto* scale =
      in_place ? to.get<float>(BufferRole::kScale) : reinterpret_cast<float*>(region(at.scale));
  auto* codes = to.get<uint8_t>(BufferRole::kCodes);
  // A codebook with absmax scales is encoded against the exact absmax, as bitsandbytes does.
  const bool exactly = encoding.book && method == Method::kRound;

  if (exactly && can_fold(w, spans, encoding)) {
    if (Status status = fold_rows(w, spans, encoding, scale, codes, stream); !status.ok())
      return status;
    return store(format, spans, encoding, to, exactly, scale, zero, parts, stream);
  }
  Status status;
  if (method == Method::kSearch) {
    const bool asymmetric = format.zero == Zero::kInt || format.zero == Zero::kFloat;
    status = search_scales(w, spans, encoding, shrinks_for(format.bits(), asymmetric), scale, zero,
                           stream);
  } else if (format.grouping == Grouping::kTensor) {
    status = round_tensor_scale(w, encoding, reinterpret_cast<float*>(region(at.low)),
                                reinterpret_cast<float*>(region(at.high)), scale, zero, stream);
  } else {
    status = round_scales(w, spans, encoding, scale, zero, stream);
  }
  if (!status.ok()) return status;
  status = store(format, spans, encoding, to, exactly, scale, zero, parts, stream);
  if (!status.ok()) return status;
  return encode_rows(w, spans, encoding, scale, zero, codes, stream);
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
