#include "cuda/linear.h"

#include <algorithm>
#include <array>
#include <optional>

#include "cuda/kernels.h"
#include "cuda/linear_mixed.h"
#include "cuda/plan_cache.h"
#include "torch/cuda/dense_product.h"

namespace bitfold::binding {
namespace {

void check_last_dim(const Tensor& x, int64_t want, const Place& place, const char* op,
                    const char* argument, const char* meaning) {
  if (x.dim() < 1 || x.size(x.dim() - 1) != want) {
    fail(op, std::string(argument) + " must be [..., " + std::to_string(want) + "] (" + meaning +
                 "), got " + shape_of(x));
  }
  check_same_gpu(x, place, op, argument, "the packed weight");
}

// The bias as contiguous numbers of x's dtype.
std::optional<Tensor> bias_row(const std::optional<Tensor>& bias, const Tensor& x, int64_t rows,
                               const Place& place, const char* op) {
  if (!bias.has_value()) return std::nullopt;
  if (bias->dim() != 1 || bias->numel() != rows) {
    fail(op, "bias must be a tensor [" + std::to_string(rows) + "] (out_features), got " +
                 shape_of(*bias));
  }
  check_same_gpu(*bias, place, op, "bias", "x");
  float_type(bias->scalar_type(), op, "bias");
  return as_contiguous(
      bias->scalar_type() == x.scalar_type() ? *bias : torch::stable::to(*bias, x.scalar_type()));
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

Tensor scratch(const Tensor& like, int64_t elements, ScalarType dtype) {
  return torch::stable::new_empty(like, {elements}, dtype);
}

// Products of dense matrices, the weight as floats a slab at a time.
struct Slabs {
  const DevicePacked& w;
  const Tensor& like;
  FloatType dtype;
  const CudaContext& context;
  const char* op;

  Tensor memory(int64_t length, int64_t other) const {
    return scratch(like, length * other, scalar_type(dtype));
  }
  void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, void* out) const {
    check(cuda::dequantize_window(w.weight, row, rows, col, cols, dtype, out, context.stream()),
          op);
  }

  void forward(const void* x, int64_t m, const void* bias, void* y) const {
    const int64_t length = cuda::slab_length(w.rows, w.cols, dtype);
    const Tensor slab = memory(length, w.cols);
    for (int64_t row = 0; row < w.rows; row += length) {
      const int64_t rows = std::min(length, w.rows - row);
      decode(row, rows, 0, w.cols, slab.mutable_data_ptr());
      multiply_dense(like, dtype, {const_cast<void*>(x), m, w.cols, w.cols},
                     {slab.mutable_data_ptr(), rows, w.cols, w.cols}, true,
                     bias ? advance(bias, dtype, row) : nullptr,
                     {advance(y, dtype, row), m, rows, w.rows});
    }
  }
  // Slabs of columns, so that every sum is one product's: nothing is rounded in between.
  void backward(const void* grad, int64_t m, void* gx) const {
    const int64_t length = cuda::slab_length(w.cols, w.rows, dtype);
    const Tensor slab = memory(length, w.rows);
    for (int64_t col = 0; col < w.cols; col += length) {
      const int64_t cols = std::min(length, w.cols - col);
      decode(0, w.rows, col, cols, slab.mutable_data_ptr());
      multiply_dense(like, dtype, {const_cast<void*>(grad), m, w.rows, w.rows},
                     {slab.mutable_data_ptr(), w.rows, cols, cols}, false, nullptr,
                     {advance(gx, dtype, col), m, cols, w.cols});
    }
  }
};

void multiply_slabs(const DevicePacked& w, const Tensor& x, int64_t m,
                    const std::optional<Tensor>& bias, FloatType dtype, bool floats, Tensor& y,
                    const CudaContext& context, const char* op) {
  if (!floats || dtype == FloatType::kFloat32) {
    Slabs{w, x, dtype, context, op}.forward(
        x.const_data_ptr(), m, bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr());
    return;
  }
  const Tensor wide = torch::stable::to(x, ScalarType::Float);
  const Tensor sums = scratch(x, m * w.rows, ScalarType::Float);
  std::optional<Tensor> row;
  if (bias) row = torch::stable::to(*bias, ScalarType::Float);
  Slabs{w, x, FloatType::kFloat32, context, op}.forward(
      wide.const_data_ptr(), m, row ? row->const_data_ptr() : nullptr, sums.mutable_data_ptr());
  Tensor flat = torch::stable::view(y, {m * w.rows});
  torch::stable::copy_(flat, sums);
}

Tensor linear(const Tensor& x, const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
              const std::optional<Tensor>& bias, int64_t accuracy) {
  constexpr const char* kOp = "linear";
  const DevicePacked w = unpack_cuda(packed, spec, kOp);
  const FloatType dtype = float_type(x.scalar_type(), kOp, "x");
  check_last_dim(x, w.cols, w.place, kOp, "x", "in_features");
  if (accuracy < 0 || accuracy > 2) {
    fail(kOp, "accuracy must be 0 (auto), 1 (fp32) or 2 (int8), got " + std::to_string(accuracy));
  }
  const CudaContext context(w.place, kOp);
  const std::optional<Tensor> row = bias_row(bias, x, w.rows, w.place, kOp);
  const Tensor rows = as_contiguous(x);
  Tensor y = empty_with_last(x, w.rows);
  const int64_t m = y.numel() / std::max<int64_t>(1, w.rows);
  const void* bias_data = row ? row->const_data_ptr() : nullptr;
  const PackedView& view = w.weight.view;
  const bool floats = accuracy == 1;  // `auto` is what `int8` may be, and no slower
  const bool aligned = is_aligned(view.codes) && is_aligned(rows.const_data_ptr());

  cuda::Way way = cuda::choose_way(view, dtype, m, floats, aligned);
  cuda::MmaPlan plan;
  if (way == cuda::Way::kMma && !cuda::cached_plan(view, m, cuda::current_gpu(), &plan))
    way = m <= 8 ? cuda::Way::kAny : cuda::Way::kSlabs;
  switch (way) {
    case cuda::Way::kNothing:
      break;
    case cuda::Way::kMma: {
      std::optional<Tensor> partial;
      if (plan.slices > 1) partial = scratch(x, plan.partials(w.rows), ScalarType::Float);
      check(cuda::linear_mma(w.weight, plan, rows.const_data_ptr(), bias_data, dtype,
                             partial ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr,
                             y.mutable_data_ptr(), context.stream()),
            kOp);
      break;
    }
    case cuda::Way::kAny:
      check(cuda::linear_any(w.weight, rows.const_data_ptr(), m, bias_data, dtype,
                             y.mutable_data_ptr(), context.stream()),
            kOp);
      break;
    case cuda::Way::kSlabs:
      multiply_slabs(w, rows, m, row, dtype, floats, y, context, kOp);
  }
  return y;
}

Tensor linear_mixed(const Tensor& x, const std::vector<Tensor>& packed,
                    const std::vector<int64_t>& spec, const std::optional<Tensor>& bias,
                    double threshold, const std::optional<std::vector<int64_t>>& columns) {
  constexpr const char* kOp = "linear_mixed";
  const DevicePacked w = unpack_cuda(packed, spec, kOp);
  const FloatType dtype = float_type(x.scalar_type(), kOp, "x");
  check_last_dim(x, w.cols, w.place, kOp, "x", "in_features");
  check_mixed(w.format, w.cols, threshold, columns, kOp);
  const CudaContext context(w.place, kOp);
  const std::optional<Tensor> row = bias_row(bias, x, w.rows, w.place, kOp);
  const Tensor rows = as_contiguous(x);
  Tensor y = empty_with_last(x, w.rows);
  const int64_t m = y.numel() / std::max<int64_t>(1, w.rows);
  const Tensor memory = scratch(x, cuda::linear_mixed_scratch_bytes(m, w.cols), ScalarType::Char);
  check(
      cuda::linear_mixed(
          w.weight, rows.const_data_ptr(), m, row ? row->const_data_ptr() : nullptr, dtype,
          {static_cast<float>(threshold), columns.has_value(), columns ? columns->data() : nullptr,
           columns ? static_cast<int64_t>(columns->size()) : 0},
          memory.mutable_data_ptr(), y.mutable_data_ptr(), context.stream()),
      kOp);
  return y;
}

Tensor linear_grad_input(const Tensor& grad, const std::vector<Tensor>& packed,
                         const std::vector<int64_t>& spec) {
  constexpr const char* kOp = "linear_grad_input";
  const DevicePacked w = unpack_cuda(packed, spec, kOp);
  const FloatType dtype = float_type(grad.scalar_type(), kOp, "grad");
  check_last_dim(grad, w.rows, w.place, kOp, "grad", "out_features");
  const CudaContext context(w.place, kOp);
  const Tensor rows = as_contiguous(grad);
  const Tensor gx = empty_with_last(grad, w.cols);
  const int64_t m = gx.numel() / std::max<int64_t>(1, w.cols);
  if (m > 0)
    Slabs{w, rows, dtype, context, kOp}.backward(rows.const_data_ptr(), m, gx.mutable_data_ptr());
  return gx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_nograd", TORCH_BOX(&linear));
  m.impl("linear_mixed", TORCH_BOX(&linear_mixed));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
}

}  // namespace bitfold::binding
