#include "solvers/cuda/hqq.h"

#include "cuda/kernels.h"

namespace bitfold {

Status hqq_solve(const Gpu& gpu, const Format& format, const HqqOptions& options,
                 const MatrixView& w, void* const* buffers) {
  if (Status status = check_hqq(format, options); !status.ok()) return status;
  const cuda::HqqSteps steps{options.p, options.beta, options.kappa,
                             static_cast<int>(options.iterations)};
  return cuda::hqq(format, steps, w, buffers,
                   gpu.allocate(cuda::quantize_scratch_bytes(format, w.rows, w.cols)), gpu.stream);
}

}  // namespace bitfold
