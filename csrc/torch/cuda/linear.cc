#include "cuda/linear.h"

#include <algorithm>
#include <array>
#include <optional>

#include "cuda/kernels.h"
#include "cuda/linear_mixed.h"
#include "cuda/plan_cache.h"
#include "torch/cuda/dense_product.h"
#include "torch/linear_arguments.h"
#include "torch/registration.h"

namespace bitfold::binding {
namespace {

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Products of dense matrices, the weight as floats a slab at a time.
struct Slabs {
  const DevicePacked& w;
  const Tensor& like;
  FloatType dtype;
  const CudaContext& context;
  const char* op;

  Tensor memory(int64_t length, int64_t other) const {
    return scratch(like, length * other * size_of(dtype));
  }
  void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, void* out) const {
    check(cuda::dequantize_window(w.weight, row, rows, col, cols, dtype, out, context.stream()),
          op);
  }

  void forward(const void* x, int64_t m, const void* bias, void* y) const {
    const int64_t length = cuda::slab_length(w.rows, w.cols, m, dtype, cuda::current_gpu());
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
    const int64_t length = cuda::slab_length(w.cols, w.rows, m, dtype, cuda::current_gpu());
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

void multiply_slabs(const DevicePacked& w, const LinearArguments& a, bool floats,
                    const CudaContext& context, const char* op) {
  if (!floats || a.dtype == FloatType::kFloat32) {
    Slabs{w, a.x, a.dtype, context, op}.forward(a.x_data(), a.m, a.bias_data(), a.y_data());
    return;
  }
  const Tensor wide = torch::stable::to(a.x, ScalarType::Float);
  const Tensor sums = torch::stable::new_empty(a.x, {a.m * w.rows}, ScalarType::Float);
  std::optional<Tensor> row;
  if (a.bias) row = torch::stable::to(*a.bias, ScalarType::Float);
  Slabs{w, a.x, FloatType::kFloat32, context, op}.forward(
      wide.const_data_ptr(), a.m, row ? row->const_data_ptr() : nullptr, sums.mutable_data_ptr());
  Tensor flat = torch::stable::view(a.y, {a.m * w.rows});
  torch::stable::copy_(flat, sums);
}

// As many rows of x at a time as linear_mma takes. False where it has no room: y is still to be
// had.
bool multiply_mma(const DevicePacked& w, const LinearArguments& a, const CudaContext& context,
                  const char* op) {
  const cuda::GpuLimits gpu = cuda::current_gpu();
  const int64_t pass = cuda::mma_pass(a.m);
  for (int64_t row = 0; row < a.m; row += pass) {
    cuda::MmaPlan plan;
    if (!cuda::cached_plan(w.weight.view, std::min(pass, a.m - row), gpu, &plan)) return false;
    std::optional<Tensor> partial;
    if (plan.slices > 1)
      partial = scratch(a.x, plan.partials(w.rows) * size_of(FloatType::kFloat32));
    check(cuda::linear_mma(w.weight, plan, advance(a.x_data(), a.dtype, row * w.cols),
                           a.bias_data(), a.dtype,
                           partial ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr,
                           advance(a.y_data(), a.dtype, row * w.rows), context.stream()),
          op);
  }
  return true;
}

Tensor linear(const Tensor& x, const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
              const std::optional<Tensor>& bias, int64_t accuracy) {
  constexpr const char* kOp = "linear";
  const DevicePacked w = unpack_cuda(packed, spec, kOp);
  // `auto` is what `int8` may be, and no slower
  const bool floats = accuracy_of(accuracy, kOp) == Accuracy::kFp32;
  const LinearArguments a = linear_arguments(x, w, bias, kOp, w.place);
  const CudaContext context(w.place, kOp);
  const PackedView& view = w.weight.view;
  const bool aligned = is_aligned(view.codes) && is_aligned(a.x_data());

  cuda::Way way = cuda::choose_way(view, a.dtype, a.m, floats, aligned);
  if (way == cuda::Way::kMma && !multiply_mma(w, a, context, kOp))
    way = a.m <= 8 ? cuda::Way::kAny : cuda::Way::kSlabs;
  switch (way) {
    case cuda::Way::kNothing:
    case cuda::Way::kMma:
      break;
    case cuda::Way::kAny:
      check(cuda::linear_any(w.weight, a.x_data(), a.m, a.bias_data(), a.dtype, a.y_data(),
                             context.stream()),
            kOp);
      break;
    case cuda::Way::kSlabs:
      multiply_slabs(w, a, floats, context, kOp);
  }
  return a.y;
}

Tensor linear_mixed(const Tensor& x, const std::vector<Tensor>& packed,
                    const std::vector<int64_t>& spec, const std::optional<Tensor>& bias,
                    double threshold, const std::optional<std::vector<int64_t>>& columns) {
  constexpr const char* kOp = "linear_mixed";
  const DevicePacked w = unpack_cuda(packed, spec, kOp);
  check_mixed(w.format, w.cols, threshold, columns, kOp);
  const LinearArguments a = linear_arguments(x, w, bias, kOp, w.place);
  const CudaContext context(w.place, kOp);
  const Tensor memory = scratch(a.x, cuda::linear_mixed_scratch_bytes(a.m, w.cols));
  check(cuda::linear_mixed(w.weight, a.x_data(), a.m, a.bias_data(), a.dtype,
                           {static_cast<float>(threshold), columns.has_value(),
                            columns ? columns->data() : nullptr,
                            columns ? static_cast<int64_t>(columns->size()) : 0},
                           memory.mutable_data_ptr(), a.y_data(), context.stream()),
        kOp);
  return a.y;
}

Tensor linear_grad_input(const Tensor& grad, const std::vector<Tensor>& packed,
                         const std::vector<int64_t>& spec) {
  constexpr const char* kOp = "linear_grad_input";
  const DevicePacked w = unpack_cuda(packed, spec, kOp);
  const LinearArguments a = grad_arguments(grad, w, kOp, w.place);
  const CudaContext context(w.place, kOp);
  if (a.m > 0) Slabs{w, a.x, a.dtype, context, kOp}.backward(a.x_data(), a.m, a.y_data());
  return a.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CUDA, m) {
  implement<"linear", &linear>(m);
  implement<"linear_nograd", &linear, "linear">(m);
  implement<"linear_mixed", &linear_mixed>(m);
  implement<"linear_grad_input", &linear_grad_input>(m);
}

}  // namespace bitfold::binding
