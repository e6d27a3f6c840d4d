#include "solvers/quantize.h"

#include "torch/checks.h"

namespace bitfold::binding {
namespace {

Tensor quantized_buffer(const Tensor& like, const BufferSpec& spec) {
  return torch::stable::new_empty(like, {spec.shape.data(), spec.shape.size()},
                                  scalar_type(spec.dtype));
}

std::vector<Tensor> quantize(Tensor weight, std::vector<int64_t> spec, int64_t method) {
  constexpr const char* kOp = "quantize";
  Format format;
  int64_t rows = 0, cols = 0;
  check(parse_spec(spec, &format, &rows, &cols), kOp);
  if (weight.dim() != 2 || weight.size(0) != rows || weight.size(1) != cols) {
    fail(kOp, "weight must be [out, in] = [" + std::to_string(rows) + ", " + std::to_string(cols) +
                  "], got " + shape_of(weight));
  }
  if (method != 0 && method != 1) {
    fail(kOp, "method must be 0 (round) or 1 (search), got " + std::to_string(method));
  }
  const MatrixView view{weight.const_data_ptr(),
                        float_type(weight.scalar_type(), kOp, "weight"),
                        rows,
                        cols,
                        weight.stride(0),
                        weight.stride(1)};
  std::vector<Tensor> packed;
  std::vector<void*> data;
  for (const BufferSpec& buffer : format.buffers(rows, cols)) {
    packed.push_back(quantized_buffer(weight, buffer));
    data.push_back(packed.back().mutable_data_ptr());
  }
  check(bitfold::quantize(kernels(kOp), format, static_cast<Method>(method), view, data.data(),
                          torch_parallel()),
        kOp);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace bitfold::binding
