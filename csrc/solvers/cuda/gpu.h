// What the solvers on a GPU borrow from the caller, and how they go on.
#pragma once

#include <chrono>
#include <functional>
#include <utility>
#include <vector>

#include "core/status.h"
#include "cuda/copy.h"
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

// One solve: the GPU, the first thing that failed (work that is queued after it does no harm), and
// whether its parts are timed, which is waiting for each of them.
class GpuRun {
 public:
  GpuRun(const Gpu& borrowed, bool timed) : gpu(borrowed), stream(borrowed.stream), timed_(timed) {}

  const Gpu& gpu;
  const cudaStream_t stream;

  void note(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

  template <class T>
  T* upload(const std::vector<T>& values) {
    auto* to = gpu.memory<T>(static_cast<int64_t>(values.size()));
    note(cuda::copy_to_device(to, values.data(), static_cast<int64_t>(values.size() * sizeof(T)),
                              stream));
    return to;
  }
  // Waits.
  template <class T>
  std::vector<T> download(const T* from, int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    note(cuda::copy_to_host(values.data(), from, count * static_cast<int64_t>(sizeof(T)), stream));
    return values;
  }

  template <class Body>
  void timed(double* seconds, const Body& body) {
    if (!timed_) return body();
    note(cuda::wait_for(stream));
    const auto start = std::chrono::steady_clock::now();
    body();
    note(cuda::wait_for(stream));
    *seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  Status status_;
  const bool timed_;
};

}  // namespace bitfold
