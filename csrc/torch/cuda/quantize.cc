#include "core/scale_coding.h"
#include "cuda/kernels.h"
#include "torch/cuda/context.h"

namespace bitfold::binding {
namespace {

// Memory for the length of a call, from torch's own pool of the current stream.
Tensor scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Char);
}

std::vector<Tensor> quantize(Tensor weight, std::vector<int64_t> spec, int64_t method) {
  constexpr const char* kOp = "quantize";
  Format format;
  int64_t rows = 0, cols = 0;
  check(parse_spec(spec, &format, &rows, &cols), kOp);
  if (method != 0 && method != 1) {
    fail(kOp, "method must be 0 (round) or 1 (search), got " + std::to_string(method));
  }
  const Place place = gpu_of(weight);
  const MatrixView view = matrix_of(weight, rows, cols, kOp, place);
  if (!cuda::can_quantize(format, static_cast<Method>(method))) {
    fail(kOp, "format " + format.to_string() +
                  (method == 0 ? " with absmax or min-max scales" : " with searched scales") +
                  " is folded on the CPU only; move the weight there");
  }
  const CudaContext context(place, kOp);
  std::vector<void*> data;
  std::vector<Tensor> packed = empty_buffers(weight, format, rows, cols, &data);
  const Tensor memory = scratch(weight, cuda::quantize_scratch_bytes(format, rows, cols));
  check(cuda::quantize(format, static_cast<Method>(method), view, data.data(),
                       memory.mutable_data_ptr(), context.stream()),
        kOp);
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> double_quantize(Tensor scales) {
  constexpr const char* kOp = "double_quantize";
  if (scales.scalar_type() != ScalarType::Float) {
    fail(kOp, std::string("scales must be a float32 tensor, got ") + name_of(scales.scalar_type()));
  }
  const CudaContext context(gpu_of(scales), kOp);
  const Tensor source = as_contiguous(scales);
  const int64_t n = source.numel();
  const std::vector<int64_t> shape(source.sizes().begin(), source.sizes().end());
  Tensor codes = torch::stable::new_empty(source, shape, ScalarType::Char);
  Tensor absmax = torch::stable::new_empty(
      source, {(n + kDoubleQuantBlock - 1) / kDoubleQuantBlock}, ScalarType::Int);
  Tensor offset = torch::stable::new_empty(source, {1}, ScalarType::Int);
  const Tensor memory = scratch(source, cuda::double_quantize_scratch_bytes());
  check(cuda::double_quantize(static_cast<const float*>(source.const_data_ptr()), n,
                              memory.mutable_data_ptr(),
                              static_cast<uint8_t*>(codes.mutable_data_ptr()),
                              static_cast<float*>(absmax.mutable_data_ptr()),
                              static_cast<float*>(offset.mutable_data_ptr()), context.stream()),
        kOp);
  return {codes, absmax, offset};
}

Tensor double_dequantize(Tensor codes, Tensor absmax, Tensor offset) {
  constexpr const char* kOp = "double_dequantize";
  const int64_t n = codes.numel();
  if (codes.scalar_type() != ScalarType::Char || absmax.scalar_type() != ScalarType::Int ||
      offset.scalar_type() != ScalarType::Int) {
    fail(kOp, "codes must be int8, absmax and offset int32 (bits of float32)");
  }
  const Place place = gpu_of(codes, absmax, offset);
  check_beside(codes, place, kOp, "codes", "absmax and offset");
  check_beside(absmax, place, kOp, "absmax", "codes");
  check_beside(offset, place, kOp, "offset", "codes");
  if (absmax.numel() != (n + kDoubleQuantBlock - 1) / kDoubleQuantBlock || offset.numel() != 1) {
    fail(kOp, "absmax must hold one value per 256 codes and offset one, got " + shape_of(absmax) +
                  " and " + shape_of(offset) + " for codes " + shape_of(codes));
  }
  const CudaContext context(place, kOp);
  const Tensor from = as_contiguous(codes), blocks = as_contiguous(absmax);
  const std::vector<int64_t> shape(codes.sizes().begin(), codes.sizes().end());
  Tensor out = torch::stable::new_empty(codes, shape, ScalarType::Float);
  check(cuda::double_dequantize(static_cast<const uint8_t*>(from.const_data_ptr()),
                                static_cast<const float*>(blocks.const_data_ptr()),
                                static_cast<const float*>(offset.const_data_ptr()), n,
                                static_cast<float*>(out.mutable_data_ptr()), context.stream()),
        kOp);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("double_quantize", TORCH_BOX(&double_quantize));
  m.impl("double_dequantize", TORCH_BOX(&double_dequantize));
}

}  // namespace bitfold::binding
