// Where the ops of solver_ops.h run in `_ops_cuda`.
#pragma once

#include <vector>

#include "solvers/cuda/gpu.h"
#include "torch/cuda/context.h"

namespace bitfold::binding {

// On a GPU and torch's current stream there, with torch's cuBLAS, cuSOLVER and memory pool; what
// is allocated lives as long. Products in fp32 are as exact as torch has been told
// (bitfold/solvers/ sees to it that feedback has no TF32).
class OnGpu {
 public:
  template <class... Arguments>
  static Place place_of(const Arguments&... arguments) {
    return gpu_of(arguments...);
  }
  OnGpu(const Place& place, const char* op);
  OnGpu(const OnGpu&) = delete;
  const Gpu& get() const { return gpu_; }

 private:
  CudaContext context_;
  LinearAlgebra algebra_;
  std::vector<Tensor> memory_;
  Gpu gpu_;
};

}  // namespace bitfold::binding
