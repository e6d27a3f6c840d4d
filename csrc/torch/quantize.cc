#include "solvers/quantize.h"

#include "torch/checks.h"

namespace bitfold::binding {
namespace {

std::vector<Tensor> quantize(Tensor weight, std::vector<int64_t> spec, int64_t method) {
  constexpr const char* kOp = "quantize";
  Format format;
  int64_t rows = 0, cols = 0;
  check(parse_spec(spec, &format, &rows, &cols), kOp);
  if (method != 0 && method != 1) {
    fail(kOp, "method must be 0 (round) or 1 (search), got " + std::to_string(method));
  }
  const MatrixView view = matrix_of(weight, rows, cols, kOp);
  std::vector<void*> data;
  std::vector<Tensor> packed = empty_buffers(weight, format, rows, cols, &data);
  check(bitfold::quantize(kernels(kOp), format, static_cast<Method>(method), view, data.data(),
                          torch_parallel()),
        kOp);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace bitfold::binding
