// What the solvers on the CPU borrow from the caller; on a GPU it is that of solvers/cuda/gpu.h.
#pragma once

#include "core/parallel.h"
#include "cpu/kernel_table.h"
#include "solvers/linear_algebra.h"

namespace bitfold {

struct Cpu {
  const KernelTable& kernels;
  const LinearAlgebra& algebra;
  const Parallel& parallel;
};

}  // namespace bitfold
