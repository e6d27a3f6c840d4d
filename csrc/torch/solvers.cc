#include "solvers/awq.h"
#include "solvers/gptq.h"
#include "solvers/hessian.h"
#include "solvers/hqq.h"
#include "torch/on_cpu.h"
#include "torch/solver_ops.h"

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  bitfold::binding::register_solvers<bitfold::binding::OnCpu>(m);
}
