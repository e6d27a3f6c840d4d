#include "cpu/linear.h"

#include <algorithm>
#include <optional>

#include "cpu/mixed_product.h"

#include "torch/checks.h"

namespace bitfold::binding {
namespace {

void check_last_dim(const Tensor& x, int64_t want, const char* op, const char* argument,
                    const char* meaning) {
  if (x.dim() < 1 || x.size(x.dim() - 1) != want) {
    fail(op, std::string(argument) + " must be [..., " + std::to_string(want) + "] (" + meaning +
                 "), got " + shape_of(x));
  }
  if (!x.is_cpu())
    fail(op, std::string(argument) + " must be on the same device as the packed weight (CPU)");
}

Accuracy to_accuracy(int64_t level, const char* op) {
  if (level < 0 || level > 2) {
    fail(op, "accuracy must be 0 (auto), 1 (fp32) or 2 (int8), got " + std::to_string(level));
  }
  return static_cast<Accuracy>(level);
}

// The bias as contiguous numbers of x's dtype.
std::optional<Tensor> bias_row(const std::optional<Tensor>& bias, const Tensor& x, int64_t rows,
                               const char* op) {
  if (!bias.has_value()) return std::nullopt;
  if (bias->dim() != 1 || bias->numel() != rows || !bias->is_cpu()) {
    fail(op, "bias must be a CPU tensor [" + std::to_string(rows) + "] (out_features), got " +
                 shape_of(*bias));
  }
  float_type(bias->scalar_type(), op, "bias");
  return as_contiguous(
      bias->scalar_type() == x.scalar_type() ? *bias : torch::stable::to(*bias, x.scalar_type()));
}

Tensor linear(const Tensor& x, const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
              const std::optional<Tensor>& bias, int64_t accuracy) {
  constexpr const char* kOp = "linear";
  const Packed w = unpack(packed, spec, kOp);
  const FloatType dtype = float_type(x.scalar_type(), kOp, "x");
  check_last_dim(x, w.cols, kOp, "x", "in_features");
  const Accuracy level = to_accuracy(accuracy, kOp);
  const std::optional<Tensor> row = bias_row(bias, x, w.rows, kOp);
  const Tensor rows = as_contiguous(x);
  const Tensor y = empty_with_last(x, w.rows);
  const int64_t m = y.numel() / std::max<int64_t>(1, w.rows);
  bitfold::linear(kernels(kOp), w.view, rows.const_data_ptr(), m,
                  row ? row->const_data_ptr() : nullptr, dtype, y.mutable_data_ptr(), level,
                  torch_parallel());
  return y;
}

Tensor linear_mixed(const Tensor& x, const std::vector<Tensor>& packed,
                    const std::vector<int64_t>& spec, const std::optional<Tensor>& bias,
                    double threshold, const std::optional<std::vector<int64_t>>& columns) {
  constexpr const char* kOp = "linear_mixed";
  const Packed w = unpack(packed, spec, kOp);
  const FloatType dtype = float_type(x.scalar_type(), kOp, "x");
  check_last_dim(x, w.cols, kOp, "x", "in_features");
  check_mixed(w.format, w.cols, threshold, columns, kOp);
  MixedColumns chosen{static_cast<float>(threshold), columns.has_value(), nullptr, 0};
  if (columns.has_value()) {
    chosen.columns = columns->data();
    chosen.count = static_cast<int64_t>(columns->size());
  }
  const std::optional<Tensor> row = bias_row(bias, x, w.rows, kOp);
  const Tensor rows = as_contiguous(x);
  const Tensor y = empty_with_last(x, w.rows);
  const int64_t m = y.numel() / std::max<int64_t>(1, w.rows);
  multiply_mixed(kernels(kOp), w.view, rows.const_data_ptr(), m,
                 row ? row->const_data_ptr() : nullptr, dtype, chosen, y.mutable_data_ptr(),
                 torch_parallel());
  return y;
}

Tensor linear_grad_input(const Tensor& grad, const std::vector<Tensor>& packed,
                         const std::vector<int64_t>& spec) {
  constexpr const char* kOp = "linear_grad_input";
  const Packed w = unpack(packed, spec, kOp);
  const FloatType dtype = float_type(grad.scalar_type(), kOp, "grad");
  check_last_dim(grad, w.rows, kOp, "grad", "out_features");
  const Tensor rows = as_contiguous(grad);
  const Tensor gx = empty_with_last(grad, w.cols);
  const int64_t m = gx.numel() / std::max<int64_t>(1, w.cols);
  bitfold::linear_grad_input(kernels(kOp), w.view, rows.const_data_ptr(), m, dtype,
                             gx.mutable_data_ptr(), torch_parallel());
  return gx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_nograd", TORCH_BOX(&linear));
  m.impl("linear_mixed", TORCH_BOX(&linear_mixed));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
}

}  // namespace bitfold::binding
