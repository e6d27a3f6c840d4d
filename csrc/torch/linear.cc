#include "cpu/linear.h"

#include <optional>

#include "cpu/mixed_product.h"
#include "torch/linear_arguments.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

Tensor linear(const Tensor& x, const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
              const std::optional<Tensor>& bias, int64_t accuracy) {
  constexpr const char* kOp = "linear";
  const Packed w = unpack(packed, spec, kOp, Layouts::kRowsOrPanels);
  const Accuracy level = accuracy_of(accuracy, kOp);
  const LinearArguments a = linear_arguments(x, w, bias, kOp);
  bitfold::linear(kernels(kOp), w.view, a.x_data(), a.m, a.bias_data(), a.dtype, a.y_data(), level,
                  torch_parallel());
  return a.y;
}

Tensor linear_mixed(const Tensor& x, const std::vector<Tensor>& packed,
                    const std::vector<int64_t>& spec, const std::optional<Tensor>& bias,
                    double threshold, const std::optional<std::vector<int64_t>>& columns) {
  constexpr const char* kOp = "linear_mixed";
  const Packed w = unpack(packed, spec, kOp, Layouts::kRows);
  check_mixed(w.format, w.cols, threshold, columns, kOp);
  const LinearArguments a = linear_arguments(x, w, bias, kOp);
  MixedColumns chosen{static_cast<float>(threshold), columns.has_value(), nullptr, 0};
  if (columns.has_value()) {
    chosen.columns = columns->data();
    chosen.count = static_cast<int64_t>(columns->size());
  }
  multiply_mixed(kernels(kOp), w.view, a.x_data(), a.m, a.bias_data(), a.dtype, chosen, a.y_data(),
                 torch_parallel());
  return a.y;
}

Tensor linear_grad_input(const Tensor& grad, const std::vector<Tensor>& packed,
                         const std::vector<int64_t>& spec) {
  constexpr const char* kOp = "linear_grad_input";
  const Packed w = unpack(packed, spec, kOp, Layouts::kRowsOrPanels);
  const LinearArguments a = grad_arguments(grad, w, kOp);
  bitfold::linear_grad_input(kernels(kOp), w.view, a.x_data(), a.m, a.dtype, a.y_data(),
                             torch_parallel());
  return a.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  implement<"linear", &linear>(m);
  implement<"linear_nograd", &linear, "linear">(m);
  implement<"linear_mixed", &linear_mixed>(m);
  implement<"linear_grad_input", &linear_grad_input>(m);
}

}  // namespace bitfold::binding
