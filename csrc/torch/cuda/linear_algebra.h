// What solvers on a GPU borrow from torch: cuBLAS, cuSOLVER, memory of its pool.
#pragma once

#include <vector>

#include "solvers/cuda/gpu.h"
#include "torch/cuda/context.h"

namespace bitfold::binding {

// On a context's GPU and stream, while it lives. Products in fp32 are as
// exact as torch has been told (bitfold/solvers/ sees to it that feedback has no TF32).
class TorchGpu {
 public:
  explicit TorchGpu(const CudaContext& context);
  TorchGpu(const TorchGpu&) = delete;
  const Gpu& get() const { return gpu_; }

 private:
  LinearAlgebra algebra_;
  std::vector<Tensor> memory_;
  Gpu gpu_;
};

}  // namespace bitfold::binding
