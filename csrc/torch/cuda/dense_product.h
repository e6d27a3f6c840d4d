// Products of dense matrices on a GPU through torch, that is cuBLAS.
#pragma once

#include "core/view.h"
#include "torch/cuda/context.h"

namespace bitfold::binding {

// Memory of a GPU as a matrix [rows, cols] of one of torch's float types; `cols` lie side by side.
struct DenseMatrix {
  void* data;
  int64_t rows, cols, stride;
};

// out = a b, or a bᵀ, and bias [out.cols] added to each row unless null. All of `dtype`, on the GPU
// of `like`, where torch queues it on its current stream.
void multiply_dense(const Tensor& like, FloatType dtype, const DenseMatrix& a, const DenseMatrix& b,
                    bool transpose_b, const void* bias, const DenseMatrix& out);

}  // namespace bitfold::binding
