#include "solvers/cuda/awq.h"
#include "solvers/cuda/gptq.h"
#include "solvers/cuda/hessian.h"
#include "solvers/cuda/hqq.h"
#include "torch/cuda/on_gpu.h"
#include "torch/solver_ops.h"

STABLE_TORCH_LIBRARY_IMPL(bitfold, CUDA, m) {
  bitfold::binding::register_solvers<bitfold::binding::OnGpu>(m);
}
