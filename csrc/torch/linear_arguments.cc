#include "torch/linear_arguments.h"

#include <algorithm>

#include "cpu/mixed_product.h"

namespace bitfold::binding {
namespace {

// x [..., from], of which y [..., to] is to be made.
LinearArguments arguments_of(const Tensor& x, int64_t from, int64_t to, const char* op,
                             const char* argument, const char* meaning, const Place& place) {
  const FloatType dtype = float_type(x.scalar_type(), op, argument);
  if (x.dim() < 1 || x.size(x.dim() - 1) != from) {
    fail(op, std::string(argument) + " must be [..., " + std::to_string(from) + "] (" + meaning +
                 "), got " + shape_of(x));
  }
  check_beside(x, place, op, argument, "the packed weight");
  const Tensor y = empty_with_last(x, to);
  return {dtype, as_contiguous(x), std::nullopt, y, y.numel() / std::max<int64_t>(1, to)};
}

}  // namespace

LinearArguments linear_arguments(const Tensor& x, const PackedBuffers& w,
                                 const std::optional<Tensor>& bias, const char* op,
                                 const Place& place) {
  LinearArguments arguments = arguments_of(x, w.cols, w.rows, op, "x", "in_features", place);
  if (!bias.has_value()) return arguments;
  if (bias->dim() != 1 || bias->numel() != w.rows) {
    fail(op, "bias must be a tensor [" + std::to_string(w.rows) + "] (out_features), got " +
                 shape_of(*bias));
  }
  check_beside(*bias, place, op, "bias", "x");
  float_type(bias->scalar_type(), op, "bias");
  arguments.bias = as_contiguous(
      bias->scalar_type() == x.scalar_type() ? *bias : torch::stable::to(*bias, x.scalar_type()));
  return arguments;
}

LinearArguments grad_arguments(const Tensor& grad, const PackedBuffers& w, const char* op,
                               const Place& place) {
  return arguments_of(grad, w.rows, w.cols, op, "grad", "out_features", place);
}

Accuracy accuracy_of(int64_t level, const char* op) {
  if (level < 0 || level > 2) {
    fail(op, "accuracy must be 0 (auto), 1 (fp32) or 2 (int8), got " + std::to_string(level));
  }
  return static_cast<Accuracy>(level);
}

void check_mixed(const Format& format, int64_t cols, double threshold,
                 const std::optional<std::vector<int64_t>>& columns, const char* op) {
  if (!suits_mixed_product(format)) {
    fail(op,
         "format must be int8-row, int8-row-dq or int8-tensor (codes of 8 bits, one scale for a "
         "row), got " +
             format.to_string());
  }
  if (!(threshold >= 0.0))
    fail(op, "threshold must not be negative, got " + std::to_string(threshold));
  int64_t last = -1;
  for (int64_t column : columns.value_or(std::vector<int64_t>())) {
    if (column <= last || column >= cols) {
      fail(op, "columns must ascend within [0, " + std::to_string(cols) + "), got " +
                   std::to_string(column) + " after " + std::to_string(last));
    }
    last = column;
  }
}

}  // namespace bitfold::binding
