#include "solvers/outliers.h"

#include <optional>

#include "torch/checks.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

Folding source_of(const Tensor& weight, const std::vector<int64_t>& spec, const char* op) {
  const Folding source = folding_of(weight, spec, op);
  if (source.format.outliers == 0)
    fail(op, "format " + source.format.to_string() + " has no outliers; add '-outliers' to it");
  return source;
}

Tensor contiguous_mask(const Tensor& mask, const MatrixView& w, const char* op) {
  if (mask.scalar_type() != ScalarType::Byte || !is_on(mask, kCpu) || mask.dim() != 2 ||
      mask.size(0) != w.rows || mask.size(1) != w.cols) {
    fail(op, "mask must be a uint8 CPU tensor [" + std::to_string(w.rows) + ", " +
                 std::to_string(w.cols) + "], got " + what_came(mask));
  }
  return as_contiguous(mask);
}

Tensor choose_outliers(Tensor weight, std::vector<int64_t> spec, int64_t method,
                       std::optional<Tensor> importance) {
  constexpr const char* kOp = "choose_outliers";
  const Folding source = source_of(weight, spec, kOp);
  const Method by = method_of(method, kOp);
  std::optional<Tensor> factors;
  if (importance.has_value()) {
    if (importance->scalar_type() != ScalarType::Float || !is_on(*importance, kCpu) ||
        importance->dim() != 1 || importance->numel() != source.weight.cols) {
      fail(kOp, "importance must be a float32 CPU tensor [" + std::to_string(source.weight.cols) +
                    "] (in_features), got " + what_came(*importance));
    }
    factors = as_contiguous(*importance);
    const auto* at = static_cast<const float*>(factors->const_data_ptr());
    for (int64_t c = 0; c < source.weight.cols; ++c) {
      if (!(at[c] >= 0.0f && at[c] <= 3e38f))
        fail(kOp, "importance[" + std::to_string(c) + "] must be finite and not negative, got " +
                      std::to_string(at[c]));
    }
  }
  Tensor mask =
      torch::stable::new_empty(weight, {source.weight.rows, source.weight.cols}, ScalarType::Byte);
  check(bitfold::choose_outliers(
            kernels(kOp), source.format, by, source.weight,
            factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr,
            static_cast<uint8_t*>(mask.mutable_data_ptr()), torch_parallel()),
        kOp);
  return mask;
}

Tensor set_aside_outliers(Tensor weight, std::vector<int64_t> spec, Tensor mask) {
  constexpr const char* kOp = "set_aside_outliers";
  const Folding source = source_of(weight, spec, kOp);
  const Tensor marked = contiguous_mask(mask, source.weight, kOp);
  Tensor out =
      torch::stable::new_empty(weight, {source.weight.rows, source.weight.cols}, ScalarType::Float);
  set_aside(kernels(kOp), source.format, source.weight,
            static_cast<const uint8_t*>(marked.const_data_ptr()),
            static_cast<float*>(out.mutable_data_ptr()), torch_parallel());
  return out;
}

std::vector<Tensor> fill_outliers(std::vector<Tensor> dense, std::vector<int64_t> spec,
                                  Tensor weight, Tensor mask) {
  constexpr const char* kOp = "fill_outliers";
  const Folding source = source_of(weight, spec, kOp);
  const int64_t rows = source.weight.rows, cols = source.weight.cols;
  const Tensor marked = contiguous_mask(mask, source.weight, kOp);
  const Spec dense_spec = make_spec(source.format.dense(), rows, cols);
  unpack(dense, {dense_spec.begin(), dense_spec.end()}, kOp,
         Layouts::kRows);  // checks them
  std::vector<void*> data;
  for (const Tensor& tensor : dense) data.push_back(tensor.mutable_data_ptr());
  std::vector<Tensor> made = empty_buffers(weight, source, &data, dense.size());
  check(bitfold::fill_outliers(kernels(kOp), source.format, source.weight,
                               static_cast<const uint8_t*>(marked.const_data_ptr()), data.data(),
                               torch_parallel()),
        kOp);
  return made;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  implement<"choose_outliers", &choose_outliers>(m);
  implement<"set_aside_outliers", &set_aside_outliers>(m);
  implement<"fill_outliers", &fill_outliers>(m);
}

}  // namespace bitfold::binding
