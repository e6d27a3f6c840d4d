// A GPU for the solvers whose memory is the host's, and whose linear algebra is plain loops.
#pragma once

#include <memory>
#include <vector>

#include "solvers/calibration.h"
#include "solvers/cuda/gpu.h"

namespace bitfold::testing {

class HostGpu {
 public:
  // Memory comes filled with NaN: what nobody wrote is seen.
  HostGpu()
      : gpu_{nullptr, naive_algebra(), [this](int64_t bytes) {
               const auto count = static_cast<size_t>(bytes) / 8 + 1;
               memory_.emplace_back(new double[count]);
               std::fill_n(memory_.back().get(), count, std::nan(""));
               return static_cast<void*>(memory_.back().get());
             }} {}
  HostGpu(const HostGpu&) = delete;
  const Gpu& get() const { return gpu_; }

 private:
  std::vector<std::unique_ptr<double[]>> memory_;
  Gpu gpu_;
};

}  // namespace bitfold::testing
