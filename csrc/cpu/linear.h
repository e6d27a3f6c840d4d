// The product of activations with a packed weight.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// How exact a product is, relative to float64 on the decoded weight; see docs/kernels.md.
enum class Accuracy : uint8_t {
  kAuto,  // at the level of rounding: 2e-4 for float32 x, 2e-3 for float16 and bfloat16
  kFp32,  // float32 multiply-adds
  kInt8,  // activations, and levels of codebooks, of 8 bits: about 1.4e-2 (or less, on tiles)
};

// y [m, w.rows] = x [m, w.cols] * w^T + bias [w.rows] or null; x, y and bias contiguous, of the
// same dtype.
void linear(const KernelTable& k, const PackedView& w, const void* x, int64_t m, const void* bias,
            FloatType dtype, void* y, Accuracy accuracy, const Parallel& parallel);

// gx [m, w.cols] = g [m, w.rows] * w; contiguous, same dtype; float32 multiply-adds.
void linear_grad_input(const KernelTable& k, const PackedView& w, const void* g, int64_t m,
                       FloatType dtype, void* gx, const Parallel& parallel);

}  // namespace bitfold
