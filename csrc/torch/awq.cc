#include "solvers/awq.h"

#include <optional>
#include <tuple>

#include "torch/linear_algebra.h"
#include "torch/solver_arguments.h"

namespace bitfold::binding {
namespace {

std::tuple<Tensor, Tensor> awq_scale(std::vector<Tensor> weights, std::vector<int64_t> specs,
                                     std::vector<int64_t> methods, std::vector<Tensor> hessians,
                                     std::vector<Tensor> channels, std::vector<Tensor> magnitudes,
                                     std::vector<int64_t> tokens, int64_t size) {
  constexpr const char* kOp = "awq_scale";
  const std::vector<AwqReader> readers =
      awq_readers(weights, specs, methods, hessians, channels, magnitudes, tokens, size, kOp);
  Tensor scale = torch::stable::new_empty(weights[0], {size}, ScalarType::Float);
  AwqScale found;
  check(bitfold::awq_scale(kernels(kOp), torch_linear_algebra(), readers, size, torch_parallel(),
                           static_cast<float*>(scale.mutable_data_ptr()), &found),
        kOp);
  return {scale, report_of(found)};
}

std::tuple<std::vector<Tensor>, Tensor> awq_clip(Tensor weight, Tensor hessian,
                                                 std::vector<int64_t> spec, int64_t method,
                                                 std::optional<Tensor> exact) {
  constexpr const char* kOp = "awq_clip";
  Format format;
  int64_t rows = 0, cols = 0;
  check(parse_spec(spec, &format, &rows, &cols), kOp);
  const MatrixView view = matrix_of(weight, rows, cols, kOp);
  const auto* h = static_cast<const float*>(
      checked(hessian, ScalarType::Float, {cols, cols}, "hessian", kOp).const_data_ptr());
  const uint8_t* marked = nullptr;
  if (exact.has_value()) {
    marked = static_cast<const uint8_t*>(
        checked(*exact, ScalarType::Byte, {rows, cols}, "exact", kOp).const_data_ptr());
  }
  std::vector<void*> data;
  std::vector<Tensor> packed = empty_buffers(weight, format, rows, cols, &data);
  AwqClip found;
  check(bitfold::awq_clip(kernels(kOp), torch_linear_algebra(), format, method_of(method, kOp),
                          view, h, marked, data.data(), torch_parallel(), &found),
        kOp);
  return {packed, report_of(found)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  m.impl("awq_scale", TORCH_BOX(&awq_scale));
  m.impl("awq_clip", TORCH_BOX(&awq_clip));
}

}  // namespace bitfold::binding
