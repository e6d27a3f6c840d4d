#include "cuda/kernels.h"
#include "torch/cuda/context.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

std::vector<Tensor> quantize(Tensor weight, std::vector<int64_t> spec, int64_t method) {
  constexpr const char* kOp = "quantize";
  const Place place = gpu_of(weight);
  const Folding folding = folding_of(weight, spec, kOp, place);
  const auto& [format, view] = folding;
  const Method by = method_of(method, kOp);
  if (!cuda::can_quantize(format, by)) {
    fail(kOp,
         "format " + format.to_string() +
             (by == Method::kRound ? " with absmax or min-max scales" : " with searched scales") +
             " is folded on the CPU only; move the weight there");
  }
  const CudaContext context(place, kOp);
  std::vector<void*> data;
  std::vector<Tensor> packed = empty_buffers(weight, folding, &data);
  const Tensor memory = scratch(weight, cuda::quantize_scratch_bytes(format, view.rows, view.cols));
  check(cuda::quantize(format, by, view, data.data(), memory.mutable_data_ptr(), context.stream()),
        kOp);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CUDA, m) { implement<"quantize", &quantize>(m); }

}  // namespace bitfold::binding
