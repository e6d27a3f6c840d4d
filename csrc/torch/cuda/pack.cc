#include "core/bitpack.h"
#include "cuda/kernels.h"
#include "torch/cuda/context.h"

namespace bitfold::binding {
namespace {

void check_bits(int64_t bits, const char* op) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    fail(op, "bits must be 2, 3, 4 or 8, got " + std::to_string(bits));
  }
}

Tensor pack_bits(Tensor codes, int64_t bits) {
  constexpr const char* kOp = "pack_bits";
  check_bits(bits, kOp);
  if (codes.dim() != 2 || codes.scalar_type() != ScalarType::Byte) {
    fail(kOp, std::string("codes must be a uint8 tensor [rows, cols], got ") +
                  name_of(codes.scalar_type()) + " " + shape_of(codes));
  }
  const CudaContext context(gpu_of(codes), kOp);
  const Tensor source = as_contiguous(codes);
  const int64_t rows = codes.size(0), cols = codes.size(1);
  const int width = static_cast<int>(bits);
  Tensor out =
      torch::stable::new_empty(codes, {rows * packed_row_bytes(cols, width)}, ScalarType::Char);
  check(cuda::pack_bits(static_cast<const uint8_t*>(source.const_data_ptr()), rows, cols, width,
                        static_cast<uint8_t*>(out.mutable_data_ptr()), context.stream()),
        kOp);
  return out;
}

Tensor unpack_bits(Tensor packed, int64_t bits, int64_t rows, int64_t cols) {
  constexpr const char* kOp = "unpack_bits";
  check_bits(bits, kOp);
  if (rows < 0 || cols < 0) fail(kOp, "rows and cols must not be negative");
  if (rows > 0 && cols > 0) check(check_shape(rows, cols), kOp);  // or the bytes below overflow
  const int width = static_cast<int>(bits);
  const int64_t bytes = rows * packed_row_bytes(cols, width);
  if (packed.dim() != 1 || packed.numel() != bytes || packed.scalar_type() != ScalarType::Char) {
    fail(kOp, "packed must be an int8 tensor [" + std::to_string(bytes) + "] for " +
                  std::to_string(rows) + " rows of " + std::to_string(cols) + " codes of " +
                  std::to_string(bits) + " bits, got " + name_of(packed.scalar_type()) + " " +
                  shape_of(packed));
  }
  const CudaContext context(gpu_of(packed), kOp);
  const Tensor source = as_contiguous(packed);
  Tensor out = torch::stable::new_empty(packed, {rows, cols}, ScalarType::Byte);
  check(cuda::unpack_bits(static_cast<const uint8_t*>(source.const_data_ptr()), rows, cols, width,
                          static_cast<uint8_t*>(out.mutable_data_ptr()), context.stream()),
        kOp);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CUDA, m) {
  m.impl("pack_bits", TORCH_BOX(&pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits));
}

}  // namespace bitfold::binding
