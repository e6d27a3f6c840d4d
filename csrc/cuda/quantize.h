// Folding on a GPU, step by step: what cuda/quantize.cc leads through. A span is what shares a
// scale: spans are numbered [scale rows, groups], as scales are stored.
#pragma once

#include <array>

#include "core/view.h"
#include "cuda/encode.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/stream.h"

namespace bitfold::cuda {

// What the scales of a tensor sum up to, in parts: each block of one kernel writes one, each block
// of the next adds them up again, so that nothing has to be cleared and nothing is atomic.
inline constexpr int kParts = 128;  // at most
BITFOLD_HOST_DEVICE inline int parts_of(int64_t n) {
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kParts ? blocks : kParts);
}
struct ScalePart {
  double sum;
  float largest, smallest;  // magnitudes; smallest of those that are not zero
};

// Sizes that several steps need.
struct Spans {
  int64_t groups;      // per row
  int64_t group_size;  // of all but the last of a row
  int64_t rows;        // of scales: those of the weight, or 1
  BITFOLD_HOST_DEVICE int64_t count() const { return rows * groups; }
};

// Where the buffers of a format are, by what they are for.
struct FoldBuffers {
  std::array<void*, 16> of_role{};
  FoldBuffers(const Format& format, int64_t rows, int64_t cols, void* const* buffers);
  template <class T>
  T* get(BufferRole role) const {
    return static_cast<T*>(of_role[static_cast<size_t>(role)]);
  }
};

Spans spans_of(const Format& format, int64_t rows, int64_t cols);

// Whether scales are stored as they are: fp32, to be chosen in their buffer.
inline bool stores_floats(const Format& format) {
  return format.family() == Family::kFixedCodebook && !format.double_quant;
}
inline bool stores_halves(const Format& format) {
  return format.family() == Family::kInteger && !format.double_quant;
}

// Scales and zero points as they are stored; they become what a reader decodes, but for scales
// `exactly` as they were chosen. fp16 scales are stored with the power of two that `parts` ask for
// (sum_scales), or with that of the buffer where `known`; `parts` receive what double-quantized
// ones sum up to.
Status store_scales(const Format& format, const Spans& spans, const DeviceEncoding& encoding,
                    const FoldBuffers& to, bool exactly, bool known, float* scale, float* zero,
                    ScalePart* parts, cudaStream_t stream);

// What each weight counts for when scales are chosen; all the same where `importance` is null.
struct Counts {
  const float* importance = nullptr;  // [cols]
  const uint8_t* dead = nullptr;      // [cols]: not 0 where weights count as zeros
  const uint8_t* exact = nullptr;     // [rows, cols] or null: not 0 where they count for nothing
  int64_t exact_stride = 0;           // of rows
};

// ---- scales.cu: scale [spans] and zero [spans], as chosen. A group with a NaN or an infinity gets
// the scale NaN.

// From the extremes.
Status round_scales(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                    const Counts& counts, float* scale, float* zero, cudaStream_t stream);
// One scale for the tensor; low [w.rows] and high [w.rows] are scratch.
Status round_tensor_scale(const MatrixView& w, const DeviceEncoding& encoding, const Counts& counts,
                          float* low, float* high, float* scale, float* zero, cudaStream_t stream);
// By squared error.
Status search_scales(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                     const Counts& counts, float* scale, float* zero, cudaStream_t stream);

// ---- store_scales.cu: as they are stored. `scale` and `zero` become what a reader decodes.

Status sum_scales(const float* scale, int64_t n, ScalePart* parts, cudaStream_t stream);
// fp16 times 2^exponent, which is found from `parts`, or, where these are null, known.
Status store_halves(const ScalePart* parts, int64_t n, float* scale, uint16_t* halves,
                    int8_t* exponent, cudaStream_t stream);
// Double quantization, exactly as core/scale_coding.h. stored_scale: null where codes are not
// chosen for what a reader decodes, else what it decodes goes there (`scale` itself may be meant);
// zero: null but for real zero points, which follow their scales.
Status store_double_quantized(const ScalePart* parts, int64_t n, int bits, const float* scale,
                              float* stored_scale, float* zero, uint8_t* codes, float* absmax,
                              float* offset, cudaStream_t stream);
// The exponent that `parts` of n scales ask for, if some may become `finest` times as large.
Status find_exponent(const ScalePart* parts, int64_t n, float finest, int8_t* exponent,
                     cudaStream_t stream);
// n scales and zero points; exponent: of fp16 scales, else null.
Status round_as_stored(const StoredRounding& rounding, const int8_t* exponent, int64_t n,
                       float* scale, float* zero, cudaStream_t stream);
Status store_zeros(const Spans& spans, const DeviceEncoding& encoding, float* zero, void* stored,
                   cudaStream_t stream);

// ---- hqq.cu

// zero [spans], real zero points as they are stored, become better ones.
Status shrink_zeros(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                    const HqqSteps& steps, const float* scale, float* zero, cudaStream_t stream);

// ---- encode.cu

// Codes for scales and zeros as decoded.
Status encode_rows(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                   const float* scale, const float* zero, uint8_t* codes, cudaStream_t stream);
// Fixed levels with scales from absmax: scale and codes in one reading. Only where can_fold says
// so.
bool can_fold(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding);
Status fold_rows(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                 float* scale, uint8_t* codes, cudaStream_t stream);

}  // namespace bitfold::cuda
