// The slow truth that every kernel is compared with: one weight at a time, double accumulators, no
// tricks.
#pragma once

#include "core/view.h"

namespace bitfold::reference {

// out [rows, cols] float, contiguous: exactly what the stored bytes say, rounded to float once per
// operation as all kernels do.
void dequantize(const PackedView& view, float* out);

// y[m, n] = sum_k x[m, k] * w[n, k] + bias[n] in double; x [m, cols], y [m, rows] contiguous, bias
// [rows] or null.
void linear(const PackedView& view, const float* x, int64_t m, const float* bias, double* y);

// Codes of one span [n] for a given scale (and zero point): the decisions of the vector encoders,
// one element at a time.
void encode_grid(const float* w, int64_t n, float inverse_scale, float zero, float top,
                 uint8_t* codes);
void encode_codebook(const float* w, int64_t n, float inverse_scale, const Codebook& book,
                     uint8_t* codes);

}  // namespace bitfold::reference
