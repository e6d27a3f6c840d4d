#include "solvers/hqq.h"

#include "torch/solver_arguments.h"

namespace bitfold::binding {
namespace {

std::vector<Tensor> hqq_solve(Tensor weight, std::vector<int64_t> spec, double p, double beta,
                              double kappa, int64_t iterations) {
  constexpr const char* kOp = "hqq_solve";
  Format format;
  int64_t rows = 0, cols = 0;
  check(parse_spec(spec, &format, &rows, &cols), kOp);
  const MatrixView view = matrix_of(weight, rows, cols, kOp);
  std::vector<void*> data;
  std::vector<Tensor> packed = empty_buffers(weight, format, rows, cols, &data);
  check(bitfold::hqq_solve(kernels(kOp), format, hqq_options(p, beta, kappa, iterations), view,
                           data.data(), torch_parallel()),
        kOp);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) { m.impl("hqq_solve", TORCH_BOX(&hqq_solve)); }

}  // namespace bitfold::binding
