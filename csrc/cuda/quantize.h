// Folding on a GPU, step by step: what cuda/quantize.cc leads through. A span is what shares a
// scale: spans are numbered [scale rows, groups], as scales are stored.
#pragma once

#include "core/shrinks.h"
#include "core/view.h"
#include "cuda/encode.h"
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

// ---- scales.cu: scale [spans] and zero [spans], as chosen. A group with a NaN or an infinity gets
// the scale NaN.

// From the extremes.
Status round_scales(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                    float* scale, float* zero, cudaStream_t stream);
// One scale for the tensor; low [w.rows] and high [w.rows] are scratch.
Status round_tensor_scale(const MatrixView& w, const DeviceEncoding& encoding, float* low,
                          float* high, float* scale, float* zero, cudaStream_t stream);
// By squared error.
Status search_scales(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                     const Shrinks& shrinks, float* scale, float* zero, cudaStream_t stream);

// ---- store_scales.cu: as they are stored. `scale` and `zero` become what a reader decodes.

Status sum_scales(const float* scale, int64_t n, ScalePart* parts, cudaStream_t stream);
// fp16 times 2^exponent, which is found from `parts`.
Status store_halves(const ScalePart* parts, int64_t n, float* scale, uint16_t* halves,
                    int8_t* exponent, cudaStream_t stream);
// Double quantization, exactly as core/scale_coding.h. stored_scale: null where codes are not
// chosen for what a reader decodes, else what it decodes goes there (`scale` itself may be meant);
// zero: null but for real zero points, which follow their scales.
Status store_double_quantized(const ScalePart* parts, int64_t n, int bits, const float* scale,
                              float* stored_scale, float* zero, uint8_t* codes, float* absmax,
                              float* offset, cudaStream_t stream);
Status store_zeros(const Spans& spans, const DeviceEncoding& encoding, float* zero, void* stored,
                   cudaStream_t stream);

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
