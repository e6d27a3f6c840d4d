#include "torch/pack_arguments.h"

#include "core/bitpack.h"
#include "core/scale_coding.h"

namespace bitfold::binding {
namespace {

CodeSizes sizes_of(int64_t rows, int64_t cols, int64_t bits, const char* op) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
    fail(op, "bits must be 2, 3, 4 or 8, got " + std::to_string(bits));
  if (rows < 0 || cols < 0) fail(op, "rows and cols must not be negative");
  CodeSizes sizes{rows, cols, static_cast<int>(bits), 0};
  if (sizes.empty()) return sizes;
  sizes.row_bytes = packed_row_bytes(cols, sizes.bits);
  return sizes;
}

int64_t blocks_of(int64_t scales) { return (scales + kDoubleQuantBlock - 1) / kDoubleQuantBlock; }

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

}  // namespace

CodeSizes sizes_to_pack(const Tensor& codes, int64_t bits, const char* op, const Place& place) {
  if (codes.dim() != 2 || codes.scalar_type() != ScalarType::Byte || !is_on(codes, place)) {
    fail(op, "codes must be a uint8 " + name_of(place) + " tensor [rows, cols], got " +
                 what_came(codes));
  }
  return sizes_of(codes.size(0), codes.size(1), bits, op);
}

CodeSizes sizes_to_unpack(const Tensor& packed, int64_t bits, int64_t rows, int64_t cols,
                          const char* op, const Place& place) {
  if (rows > 0 && cols > 0) check(check_shape(rows, cols), op);  // or the bytes below overflow
  const CodeSizes sizes = sizes_of(rows, cols, bits, op);
  const int64_t bytes = rows * sizes.row_bytes;
  if (packed.dim() != 1 || packed.numel() != bytes || packed.scalar_type() != ScalarType::Char ||
      !is_on(packed, place)) {
    fail(op, "packed must be an int8 " + name_of(place) + " tensor [" + std::to_string(bytes) +
                 "] for " + std::to_string(rows) + " rows of " + std::to_string(cols) +
                 " codes of " + std::to_string(bits) + " bits, got " + what_came(packed));
  }
  return sizes;
}

CodedScales empty_coded_scales(const Tensor& scales, const char* op, const Place& place) {
  if (scales.scalar_type() != ScalarType::Float || !is_on(scales, place)) {
    fail(op, "scales must be a float32 " + name_of(place) + " tensor, got " + what_came(scales));
  }
  return {torch::stable::new_empty(scales, sizes_of(scales), ScalarType::Char),
          torch::stable::new_empty(scales, {blocks_of(scales.numel())}, ScalarType::Int),
          torch::stable::new_empty(scales, {1}, ScalarType::Int)};
}

Tensor empty_scales(const CodedScales& coded, const char* op, const Place& place) {
  const auto& [codes, absmax, offset] = coded;
  if (codes.scalar_type() != ScalarType::Char || absmax.scalar_type() != ScalarType::Int ||
      offset.scalar_type() != ScalarType::Int) {
    fail(op, "codes must be int8, absmax and offset int32 (bits of float32)");
  }
  check_beside(codes, place, op, "codes", "absmax and offset");
  check_beside(absmax, place, op, "absmax", "codes");
  check_beside(offset, place, op, "offset", "codes");
  if (absmax.numel() != blocks_of(codes.numel()) || offset.numel() != 1) {
    fail(op, "absmax must hold one value per 256 codes and offset one, got " + shape_of(absmax) +
                 " and " + shape_of(offset) + " for codes " + shape_of(codes));
  }
  return torch::stable::new_empty(codes, sizes_of(codes), ScalarType::Float);
}

}  // namespace bitfold::binding
