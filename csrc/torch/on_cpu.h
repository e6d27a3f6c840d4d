// Where the ops of solver_ops.h run in `_ops`.
#pragma once

#include "solvers/cpu.h"
#include "torch/checks.h"
#include "torch/linear_algebra.h"

namespace bitfold::binding {

// On the CPU, with the kernels of the active instruction set, torch's BLAS, LAPACK and threads.
class OnCpu {
 public:
  template <class... Arguments>
  static Place place_of(const Arguments&... /*arguments*/) {
    return kCpu;
  }
  OnCpu(const Place& /*place*/, const char* op)
      : cpu_{kernels(op), torch_linear_algebra(), torch_parallel()} {}
  const Cpu& get() const { return cpu_; }

 private:
  Cpu cpu_;
};

}  // namespace bitfold::binding
