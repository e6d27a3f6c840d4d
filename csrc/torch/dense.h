// Dense linear algebra of torch on borrowed memory, on whichever device it lies.
#pragma once

#include <type_traits>

#include "torch/checks.h"

namespace bitfold::binding {

using torch::stable::Device;

// Borrowed memory as a tensor [rows, cols]; torch hands transposed ones to BLAS as they are.
Tensor borrow(const void* data, ScalarType dtype, const Device& device, int64_t rows, int64_t cols,
              int64_t row_stride, int64_t col_stride);

template <class T>
Tensor borrow(const T* data, const Device& device, int64_t rows, int64_t cols, int64_t row_stride,
              int64_t col_stride) {
  return borrow(data, std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double, device,
                rows, cols, row_stride, col_stride);
}

// a [n, n], column-major, of which the upper triangle is read, becomes the u of a = u^T u, zero
// below; `status`, an int32 scalar on the same device, becomes 0 where that is possible.
void factor_in_place(const Tensor& a, const Tensor& status);

// b [n, m] <- (l l^T)^-1 b.
void solve_with_factor(const float* l, const Device& device, int64_t n, int64_t m, float* b,
                       int64_t ldb);

}  // namespace bitfold::binding
