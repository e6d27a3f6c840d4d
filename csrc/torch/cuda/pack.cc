#include "cuda/kernels.h"
#include "torch/cuda/context.h"
#include "torch/pack_arguments.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

Tensor pack_bits(Tensor codes, int64_t bits) {
  constexpr const char* kOp = "pack_bits";
  const Place place = gpu_of(codes);
  const CodeSizes n = sizes_to_pack(codes, bits, kOp, place);
  const CudaContext context(place, kOp);
  const Tensor source = as_contiguous(codes);
  Tensor out = torch::stable::new_empty(codes, {n.rows * n.row_bytes}, ScalarType::Char);
  if (n.empty()) return out;
  check(cuda::pack_bits(static_cast<const uint8_t*>(source.const_data_ptr()), n.rows, n.cols,
                        n.bits, static_cast<uint8_t*>(out.mutable_data_ptr()), context.stream()),
        kOp);
  return out;
}

Tensor unpack_bits(Tensor packed, int64_t bits, int64_t rows, int64_t cols) {
  constexpr const char* kOp = "unpack_bits";
  const Place place = gpu_of(packed);
  const CodeSizes n = sizes_to_unpack(packed, bits, rows, cols, kOp, place);
  const CudaContext context(place, kOp);
  const Tensor source = as_contiguous(packed);
  Tensor out = torch::stable::new_empty(packed, {rows, cols}, ScalarType::Byte);
  if (n.empty()) return out;
  check(cuda::unpack_bits(static_cast<const uint8_t*>(source.const_data_ptr()), rows, cols, n.bits,
                          static_cast<uint8_t*>(out.mutable_data_ptr()), context.stream()),
        kOp);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> double_quantize(Tensor scales) {
  constexpr const char* kOp = "double_quantize";
  const Place place = gpu_of(scales);
  const auto [codes, absmax, offset] = empty_coded_scales(scales, kOp, place);
  const CudaContext context(place, kOp);
  const Tensor source = as_contiguous(scales);
  const Tensor memory = scratch(source, cuda::double_quantize_scratch_bytes());
  check(cuda::double_quantize(static_cast<const float*>(source.const_data_ptr()), source.numel(),
                              memory.mutable_data_ptr(),
                              static_cast<uint8_t*>(codes.mutable_data_ptr()),
                              static_cast<float*>(absmax.mutable_data_ptr()),
                              static_cast<float*>(offset.mutable_data_ptr()), context.stream()),
        kOp);
  return {codes, absmax, offset};
}

Tensor double_dequantize(Tensor codes, Tensor absmax, Tensor offset) {
  constexpr const char* kOp = "double_dequantize";
  const Place place = gpu_of(codes, absmax, offset);
  Tensor out = empty_scales({codes, absmax, offset}, kOp, place);
  const CudaContext context(place, kOp);
  const Tensor from = as_contiguous(codes), blocks = as_contiguous(absmax);
  check(cuda::double_dequantize(static_cast<const uint8_t*>(from.const_data_ptr()),
                                static_cast<const float*>(blocks.const_data_ptr()),
                                static_cast<const float*>(offset.const_data_ptr()), codes.numel(),
                                static_cast<float*>(out.mutable_data_ptr()), context.stream()),
        kOp);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CUDA, m) {
  implement<"pack_bits", &pack_bits>(m);
  implement<"unpack_bits", &unpack_bits>(m);
  implement<"double_quantize", &double_quantize>(m);
  implement<"double_dequantize", &double_dequantize>(m);
}

}  // namespace bitfold::binding
