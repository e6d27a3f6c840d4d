#include <cmath>
#include <tuple>

#include "core/bitpack.h"
#include "core/scale_coding.h"
#include "cpu/isa.h"
#include "torch/checks.h"

namespace bitfold::binding {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;

void check_bits(int64_t bits, const char* op) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    fail(op, "bits must be 2, 3, 4 or 8, got " + std::to_string(bits));
  }
}

Tensor pack_bits(Tensor codes, int64_t bits) {
  constexpr const char* kOp = "pack_bits";
  check_bits(bits, kOp);
  if (codes.dim() != 2 || codes.scalar_type() != ScalarType::Byte || !codes.is_cpu()) {
    fail(kOp, std::string("codes must be a uint8 CPU tensor [rows, cols], got ") +
                  name_of(codes.scalar_type()) + " " + shape_of(codes));
  }
  const Tensor source = torch::stable::contiguous(codes);
  const int64_t rows = codes.size(0), cols = codes.size(1);
  const int64_t row_bytes = packed_row_bytes(cols, static_cast<int>(bits));
  Tensor out = torch::stable::new_empty(codes, {rows * row_bytes}, ScalarType::Char);
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; bits < 8 && i < rows * cols; ++i) {
    if (from[i] >> bits) {
      fail(kOp, "codes[" + std::to_string(i / cols) + ", " + std::to_string(i % cols) + "] is " +
                    std::to_string(from[i]) + ", too large for " + std::to_string(bits) + " bits");
    }
  }
  torch_parallel()(rows, grain(cols, kGrainBytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      pack_row(from + r * cols, cols, static_cast<int>(bits), to + r * row_bytes);
  });
  return out;
}

Tensor unpack_bits(Tensor packed, int64_t bits, int64_t rows, int64_t cols) {
  constexpr const char* kOp = "unpack_bits";
  check_bits(bits, kOp);
  if (rows < 0 || cols < 0) fail(kOp, "rows and cols must not be negative");
  if (rows > 0 && cols > 0) check(check_shape(rows, cols), kOp);  // or the bytes below overflow
  const int64_t row_bytes = packed_row_bytes(cols, static_cast<int>(bits));
  if (packed.dim() != 1 || packed.numel() != rows * row_bytes ||
      packed.scalar_type() != ScalarType::Char || !packed.is_cpu()) {
    fail(kOp, "packed must be an int8 CPU tensor [" + std::to_string(rows * row_bytes) + "] for " +
                  std::to_string(rows) + " rows of " + std::to_string(cols) + " codes of " +
                  std::to_string(bits) + " bits, got " + name_of(packed.scalar_type()) + " " +
                  shape_of(packed));
  }
  const Tensor source = torch::stable::contiguous(packed);
  Tensor out = torch::stable::new_empty(packed, {rows, cols}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  torch_parallel()(rows, grain(cols, kGrainBytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      unpack_row(from + r * row_bytes, cols, static_cast<int>(bits), to + r * cols);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> double_quantize(Tensor scales) {
  constexpr const char* kOp = "double_quantize";
  if (scales.scalar_type() != ScalarType::Float || !scales.is_cpu()) {
    fail(kOp,
         std::string("scales must be a float32 CPU tensor, got ") + name_of(scales.scalar_type()));
  }
  const Tensor source = torch::stable::contiguous(scales);
  const int64_t n = source.numel();
  const auto* from = static_cast<const float*>(source.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(from[i]))
      fail(kOp, "scales[" + std::to_string(i) + "] (flat) is not finite");
  }
  const std::vector<int64_t> shape(source.sizes().begin(), source.sizes().end());
  Tensor codes = torch::stable::new_empty(source, shape, ScalarType::Char);
  Tensor absmax = torch::stable::new_empty(
      source, {(n + kDoubleQuantBlock - 1) / kDoubleQuantBlock}, ScalarType::Int);
  Tensor offset = torch::stable::new_empty(source, {1}, ScalarType::Int);
  bitfold::double_quantize(from, n, static_cast<uint8_t*>(codes.mutable_data_ptr()),
                           static_cast<float*>(absmax.mutable_data_ptr()),
                           static_cast<float*>(offset.mutable_data_ptr()));
  return {codes, absmax, offset};
}

Tensor double_dequantize(Tensor codes, Tensor absmax, Tensor offset) {
  constexpr const char* kOp = "double_dequantize";
  const int64_t n = codes.numel();
  if (codes.scalar_type() != ScalarType::Char || absmax.scalar_type() != ScalarType::Int ||
      offset.scalar_type() != ScalarType::Int || !codes.is_cpu() || !absmax.is_cpu() ||
      !offset.is_cpu()) {
    fail(kOp, "codes must be int8, absmax and offset int32 (bits of float32), all on the CPU");
  }
  if (absmax.numel() != (n + kDoubleQuantBlock - 1) / kDoubleQuantBlock || offset.numel() != 1) {
    fail(kOp, "absmax must hold one value per 256 codes and offset one, got " + shape_of(absmax) +
                  " and " + shape_of(offset) + " for codes " + shape_of(codes));
  }
  const Tensor from = torch::stable::contiguous(codes), blocks = torch::stable::contiguous(absmax);
  const std::vector<int64_t> shape(codes.sizes().begin(), codes.sizes().end());
  Tensor out = torch::stable::new_empty(codes, shape, ScalarType::Float);
  bitfold::double_dequantize(static_cast<const uint8_t*>(from.const_data_ptr()),
                             static_cast<const float*>(blocks.const_data_ptr()),
                             *static_cast<const float*>(offset.const_data_ptr()), n,
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
  m.impl("pack_bits", TORCH_BOX(&pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits));
  m.impl("double_quantize", TORCH_BOX(&double_quantize));
  m.impl("double_dequantize", TORCH_BOX(&double_dequantize));
}

// No tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(bitfold, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace bitfold::binding
