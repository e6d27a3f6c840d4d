#include "solvers/awq.h"

#include <array>
#include <optional>
#include <tuple>

#include "torch/checks.h"
#include "torch/linear_algebra.h"

namespace bitfold::binding {
namespace {

Method method_of(int64_t method, const char* op) {
  if (method != 0 && method != 1)
    fail(op, "method must be 0 (round) or 1 (search), got " + std::to_string(method));
  return static_cast<Method>(method);
}

// A contiguous CPU tensor of this dtype and shape.
const Tensor& checked(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
                      const char* argument, const std::string& op) {
  const bool fits =
      tensor.scalar_type() == dtype && tensor.is_cpu() && tensor.is_contiguous() &&
      std::equal(tensor.sizes().begin(), tensor.sizes().end(), shape.begin(), shape.end());
  if (fits) return tensor;
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  fail(op.c_str(), std::string(argument) + " must be a contiguous " + name_of(dtype) +
                       " CPU tensor [" + wanted + "], got " + name_of(tensor.scalar_type()) + " " +
                       shape_of(tensor));
}

Tensor report_of(std::initializer_list<double> values) {
  return cpu_tensor(values.begin(), values.size());
}

std::tuple<Tensor, Tensor> awq_scale(std::vector<Tensor> weights, std::vector<int64_t> specs,
                                     std::vector<int64_t> methods, std::vector<Tensor> hessians,
                                     std::vector<Tensor> channels, std::vector<Tensor> magnitudes,
                                     std::vector<int64_t> tokens, int64_t size) {
  constexpr const char* kOp = "awq_scale";
  const size_t count = weights.size();
  if (count == 0) fail(kOp, "there must be at least one reader of the scaled channels");
  if (specs.size() != count * kSpecLength || methods.size() != count || hessians.size() != count ||
      channels.size() != count || magnitudes.size() != count || tokens.size() != count) {
    fail(kOp,
         "there must be one spec, method, Hessian, channel map, mean |x| and number of tokens "
         "for each of the " +
             std::to_string(count) + " weights");
  }
  if (size < 1 || size > kMaxWeights)
    fail(kOp, "channels must be at least 1, got " + std::to_string(size));
  std::vector<AwqReader> readers(count);
  for (size_t i = 0; i < count; ++i) {
    const std::string op = std::string(kOp) + ": reader " + std::to_string(i);
    const auto* spec = specs.data() + i * kSpecLength;
    int64_t rows = 0, cols = 0;
    AwqReader& reader = readers[i];
    check(parse_spec({spec, spec + kSpecLength}, &reader.format, &rows, &cols), op.c_str());
    reader.method = method_of(methods[i], op.c_str());
    reader.weight = matrix_of(weights[i], rows, cols, op.c_str());
    reader.hessian = static_cast<const float*>(
        checked(hessians[i], ScalarType::Float, {cols, cols}, "hessian", op).const_data_ptr());
    reader.channel = static_cast<const int64_t*>(
        checked(channels[i], ScalarType::Long, {cols}, "channel", op).const_data_ptr());
    reader.magnitude = static_cast<const float*>(
        checked(magnitudes[i], ScalarType::Float, {cols}, "mean_abs", op).const_data_ptr());
    reader.tokens = tokens[i];
  }
  Tensor scale = torch::stable::new_empty(weights[0], {size}, ScalarType::Float);
  AwqScale found;
  check(bitfold::awq_scale(kernels(kOp), torch_linear_algebra(), readers, size, torch_parallel(),
                           static_cast<float*>(scale.mutable_data_ptr()), &found),
        kOp);
  // In the order of bitfold.solvers.awq.
  return {scale, report_of({found.better ? 1.0 : 0.0, found.alpha, found.by_weight ? 1.0 : 0.0,
                            found.before, found.after})};
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
  return {packed, report_of({static_cast<double>(found.groups), static_cast<double>(found.clipped),
                             found.before, found.after})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  m.impl("awq_scale", TORCH_BOX(&awq_scale));
  m.impl("awq_clip", TORCH_BOX(&awq_clip));
}

}  // namespace bitfold::binding
