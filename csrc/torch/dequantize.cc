#include <algorithm>

#include "cpu/dequantize.h"
#include "torch/checks.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

Tensor dequantize(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
                  ScalarType dtype) {
  constexpr const char* kOp = "dequantize";
  const Packed w = unpack(packed, spec, kOp, Layouts::kRowsOrPanels);
  const FloatType type = float_type(dtype, kOp, "dtype");
  Tensor out = torch::stable::new_empty(packed[0], {w.rows, w.cols}, dtype);
  bitfold::dequantize(kernels(kOp), w.view, type, out.mutable_data_ptr(), torch_parallel());
  return out;
}

Tensor embedding(const Tensor& indices, const std::vector<Tensor>& packed,
                 const std::vector<int64_t>& spec, ScalarType dtype) {
  constexpr const char* kOp = "embedding";
  const Packed w = unpack(packed, spec, kOp, Layouts::kRowsOrPanels);
  const FloatType type = float_type(dtype, kOp, "dtype");
  if (indices.scalar_type() != ScalarType::Long && indices.scalar_type() != ScalarType::Int) {
    fail(kOp, std::string("indices must be int64 or int32, got ") + name_of(indices.scalar_type()));
  }
  check_beside(indices, kCpu, kOp, "indices", "the packed weight");
  const Tensor wide = as_contiguous(indices.scalar_type() == ScalarType::Long
                                        ? indices
                                        : torch::stable::to(indices, ScalarType::Long));
  const auto* index = static_cast<const int64_t*>(wide.const_data_ptr());
  const int64_t count = wide.numel();
  const auto* bad =
      std::find_if(index, index + count, [&](int64_t i) { return i < 0 || i >= w.rows; });
  if (bad != index + count) {
    fail(kOp, "index " + std::to_string(*bad) + " is out of range; the table has " +
                  std::to_string(w.rows) + " rows");
  }
  std::vector<int64_t> sizes(wide.sizes().begin(), wide.sizes().end());
  sizes.push_back(w.cols);
  Tensor out = torch::stable::new_empty(packed[0], sizes, dtype);
  bitfold::embedding(kernels(kOp), w.view, index, count, type, out.mutable_data_ptr(),
                     torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  implement<"dequantize", &dequantize>(m);
  implement<"embedding", &embedding>(m);
}

}  // namespace bitfold::binding
