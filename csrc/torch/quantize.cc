#include "solvers/quantize.h"

#include "torch/checks.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

std::vector<Tensor> quantize(Tensor weight, std::vector<int64_t> spec, int64_t method) {
  constexpr const char* kOp = "quantize";
  const Folding folding = folding_of(weight, spec, kOp);
  const Method by = method_of(method, kOp);
  std::vector<void*> data;
  std::vector<Tensor> packed = empty_buffers(weight, folding, &data);
  check(bitfold::quantize(kernels(kOp), folding.format, by, folding.weight, data.data(),
                          torch_parallel()),
        kOp);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) { implement<"quantize", &quantize>(m); }

}  // namespace bitfold::binding
