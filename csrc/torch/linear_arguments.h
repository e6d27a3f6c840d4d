// What products with a packed weight are given, checked the same way on the CPU and on a GPU.
#pragma once

#include <optional>

#include "cpu/linear.h"
#include "torch/checks.h"

namespace bitfold::binding {

struct LinearArguments {
  FloatType dtype;             // of x, bias and y
  Tensor x;                    // contiguous
  std::optional<Tensor> bias;  // contiguous
  Tensor y;                    // yet to be written
  int64_t m;                   // rows of x and y

  const void* x_data() const { return x.const_data_ptr(); }
  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }
  void* y_data() const { return y.mutable_data_ptr(); }
};

// x [..., in], bias [out], y [..., out].
LinearArguments linear_arguments(const Tensor& x, const PackedBuffers& w,
                                 const std::optional<Tensor>& bias, const char* op,
                                 const Place& place = kCpu);
// The gradient of y [..., out] as x, that of x [..., in] as y.
LinearArguments grad_arguments(const Tensor& grad, const PackedBuffers& w, const char* op,
                               const Place& place = kCpu);

Accuracy accuracy_of(int64_t level, const char* op);

// What linear_mixed is given beside tensors.
void check_mixed(const Format& format, int64_t cols, double threshold,
                 const std::optional<std::vector<int64_t>>& columns, const char* op);

}  // namespace bitfold::binding
