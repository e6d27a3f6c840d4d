// Every host entry point of the GPU side. All pointers are the current device's memory unless said
// otherwise; work is queued on `stream` and nothing waits for it. A failed launch is a Status.
#pragma once

#include <cstdint>

#include "core/view.h"
#include "cuda/stream.h"
#include "cuda/weight.h"

namespace bitfold::cuda {

// out [rows, cols] in `dtype`, contiguous.
Status dequantize(const DeviceWeight& w, FloatType dtype, void* out, cudaStream_t stream);
// A part of it: out [rows, cols], the first of which are first_row and first_col of the weight.
Status dequantize_window(const DeviceWeight& w, int64_t first_row, int64_t rows, int64_t first_col,
                         int64_t cols, FloatType dtype, void* out, cudaStream_t stream);

// out[i, :] = w[indices[i], :], i < count; int64 indices if `wide`, else int32. An index outside of
// the rows fails an assertion on the device, as in torch's own embedding: looking before would be
// waiting.
Status embedding(const DeviceWeight& w, const void* indices, bool wide, int64_t count,
                 FloatType dtype, void* out, cudaStream_t stream);

// A float matrix into `buffers`, in the order of Format::buffers: the same bits as
// bitfold::quantize makes on the CPU. Nobody looks for NaN and infinity: their group decodes to
// NaN. Where can_quantize says no (learned codebooks, outliers, one searched scale for the tensor)
// the CPU is asked instead.
bool can_quantize(const Format& format, Method method);
int64_t quantize_scratch_bytes(const Format& format, int64_t rows, int64_t cols);
Status quantize(const Format& format, Method method, const MatrixView& w, void* const* buffers,
                void* scratch, cudaStream_t stream);

// Half-quadratic quantization of a format with real zero points of groups or rows: quantize() with
// searched scales, and its scratch, but for the zero points (solvers/hqq.h).
struct HqqSteps {
  float p, beta, kappa;
  int iterations;
};
Status hqq(const Format& format, const HqqSteps& steps, const MatrixView& w, void* const* buffers,
           void* scratch, cudaStream_t stream);

// As core/scale_coding.h's; scales [n] are read only, absmax [ceil(n / 256)], offset [1].
int64_t double_quantize_scratch_bytes();
Status double_quantize(const float* scales, int64_t n, void* scratch, uint8_t* codes, float* absmax,
                       float* offset, cudaStream_t stream);
Status double_dequantize(const uint8_t* codes, const float* absmax, const float* offset, int64_t n,
                         float* scales, cudaStream_t stream);

// codes [rows, cols], a byte each, of which the lower `bits` are taken; packed as core/bitpack.h
// says.
Status pack_bits(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t* packed,
                 cudaStream_t stream);
Status unpack_bits(const uint8_t* packed, int64_t rows, int64_t cols, int bits, uint8_t* codes,
                   cudaStream_t stream);

}  // namespace bitfold::cuda
