// What the solvers on a GPU borrow from the caller.
#pragma once

#include <functional>

#include "cuda/stream.h"
#include "solvers/linear_algebra.h"

namespace bitfold {

struct Gpu {
  cudaStream_t stream;
  const LinearAlgebra& algebra;  // on the GPU's memory, queued on `stream`; a Cholesky
                                 // factorization waits for its answer
  std::function<void*(int64_t bytes)> allocate;  // of the GPU; kept until the solver has returned

  template <class T>
  T* memory(int64_t count) const {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
};

}  // namespace bitfold
