#include <cmath>
#include <tuple>

#include "core/bitpack.h"
#include "core/scale_coding.h"
#include "cpu/isa.h"
#include "torch/pack_arguments.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;

Tensor pack_bits(Tensor codes, int64_t bits) {
  constexpr const char* kOp = "pack_bits";
  const CodeSizes n = sizes_to_pack(codes, bits, kOp);
  const Tensor source = as_contiguous(codes);
  Tensor out = torch::stable::new_empty(codes, {n.rows * n.row_bytes}, ScalarType::Char);
  if (n.empty()) return out;
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; bits < 8 && i < n.rows * n.cols; ++i) {
    if (from[i] >> bits) {
      fail(kOp, "codes[" + std::to_string(i / n.cols) + ", " + std::to_string(i % n.cols) +
                    "] is " + std::to_string(from[i]) + ", too large for " + std::to_string(bits) +
                    " bits");
    }
  }
  torch_parallel()(n.rows, grain(n.cols, kGrainBytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      pack_row(from + r * n.cols, n.cols, n.bits, to + r * n.row_bytes);
  });
  return out;
}

Tensor unpack_bits(Tensor packed, int64_t bits, int64_t rows, int64_t cols) {
  constexpr const char* kOp = "unpack_bits";
  const CodeSizes n = sizes_to_unpack(packed, bits, rows, cols, kOp);
  const Tensor source = as_contiguous(packed);
  Tensor out = torch::stable::new_empty(packed, {rows, cols}, ScalarType::Byte);
  if (n.empty()) return out;
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  torch_parallel()(rows, grain(cols, kGrainBytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      unpack_row(from + r * n.row_bytes, cols, n.bits, to + r * cols);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> double_quantize(Tensor scales) {
  constexpr const char* kOp = "double_quantize";
  const auto [codes, absmax, offset] = empty_coded_scales(scales, kOp);
  const Tensor source = as_contiguous(scales);
  const int64_t n = source.numel();
  const auto* from = static_cast<const float*>(source.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(from[i]))
      fail(kOp, "scales[" + std::to_string(i) + "] (flat) is not finite");
  }
  bitfold::double_quantize(from, n, static_cast<uint8_t*>(codes.mutable_data_ptr()),
                           static_cast<float*>(absmax.mutable_data_ptr()),
                           static_cast<float*>(offset.mutable_data_ptr()));
  return {codes, absmax, offset};
}

Tensor double_dequantize(Tensor codes, Tensor absmax, Tensor offset) {
  constexpr const char* kOp = "double_dequantize";
  Tensor out = empty_scales({codes, absmax, offset}, kOp);
  const Tensor from = as_contiguous(codes), blocks = as_contiguous(absmax);
  bitfold::double_dequantize(static_cast<const uint8_t*>(from.const_data_ptr()),
                             static_cast<const float*>(blocks.const_data_ptr()),
                             *static_cast<const float*>(offset.const_data_ptr()), codes.numel(),
                             static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

int64_t instruction_set() {
  const KernelTable* table = &kernels("instruction_set");
  const auto& list = instruction_sets();
  return std::find_if(list.begin(), list.end(),
                      [&](const InstructionSet& isa) { return isa.table == table; }) -
         list.begin();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  implement<"pack_bits", &pack_bits>(m);
  implement<"unpack_bits", &unpack_bits>(m);
  implement<"double_quantize", &double_quantize>(m);
  implement<"double_dequantize", &double_dequantize>(m);
}

// No tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(bitfold, CompositeExplicitAutograd, m) {
  implement<"instruction_set", &instruction_set>(m);
}

}  // namespace bitfold::binding
