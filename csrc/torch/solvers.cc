#include <optional>
#include <tuple>

#include "solvers/gptq.h"
#include "solvers/hessian.h"
#include "torch/checks.h"
#include "torch/linear_algebra.h"

namespace bitfold::binding {
namespace {

// ---- statistics ----

void check_mean(const Tensor& mean, int64_t n, const char* op, const char* argument) {
  if ((mean.scalar_type() != ScalarType::Float && mean.scalar_type() != ScalarType::Double) ||
      mean.dim() != 2 || mean.size(0) != n || mean.size(1) != n || !mean.is_cpu() ||
      !mean.is_contiguous()) {
    fail(op, std::string(argument) +
                 " must be a contiguous float32 or float64 CPU tensor [in, in] = [" +
                 std::to_string(n) + ", " + std::to_string(n) + "], got " +
                 name_of(mean.scalar_type()) + " " + shape_of(mean));
  }
}

// Activations [..., n] as rows; `kept` holds a copy where they must be made contiguous.
MatrixView rows_of(const Tensor& x, const char* op, const char* argument, Tensor* kept) {
  if (x.dim() < 1 || x.size(x.dim() - 1) < 1 || !x.is_cpu()) {
    fail(op, std::string(argument) + " must be a CPU tensor [..., in], got " + shape_of(x));
  }
  const FloatType dtype = float_type(x.scalar_type(), op, argument);
  const int64_t n = x.size(x.dim() - 1);
  *kept = as_contiguous(x);
  return {kept->const_data_ptr(), dtype, kept->numel() / n, n, n, 1};
}

// The mask's bytes, one per row of x; `kept` owns them.
const uint8_t* bytes_of_mask(const std::optional<Tensor>& mask, int64_t rows, const char* op,
                             std::optional<Tensor>* kept) {
  if (!mask.has_value()) return nullptr;
  if ((mask->scalar_type() != ScalarType::Bool && mask->scalar_type() != ScalarType::Byte) ||
      mask->numel() != rows || !mask->is_cpu()) {
    fail(op, "mask must be a bool or uint8 CPU tensor with one entry per row of x (" +
                 std::to_string(rows) + "), got " + name_of(mask->scalar_type()) + " " +
                 shape_of(*mask));
  }
  *kept = as_contiguous(*mask);
  return static_cast<const uint8_t*>((*kept)->const_data_ptr());
}

void check_tokens(int64_t tokens, const char* op) {
  if (tokens < 0) {
    fail(op, "tokens must be the number of rows in the mean so far, got " + std::to_string(tokens));
  }
}

// job(data) with the pointer in its own type.
template <class Job>
auto with_data(Tensor& mean, const Job& job) {
  return mean.scalar_type() == ScalarType::Float
             ? job(static_cast<float*>(mean.mutable_data_ptr()))
             : job(static_cast<double*>(mean.mutable_data_ptr()));
}

std::tuple<int64_t, int64_t> hessian_update(Tensor hessian, Tensor x, std::optional<Tensor> mask,
                                            int64_t tokens) {
  constexpr const char* kOp = "hessian_update";
  Tensor kept;
  std::optional<Tensor> kept_mask;
  const MatrixView rows = rows_of(x, kOp, "x", &kept);
  check_mean(hessian, rows.cols, kOp, "hessian");
  check_tokens(tokens, kOp);
  const uint8_t* counted = bytes_of_mask(mask, rows.rows, kOp, &kept_mask);
  const Counts counts = with_data(hessian, [&](auto* data) {
    return update_hessian(kernels(kOp), rows, counted, tokens, torch_linear_algebra(),
                          torch_parallel(), data);
  });
  return {counts.counted, counts.dropped};
}

void hessian_finish(Tensor hessian) {
  constexpr const char* kOp = "hessian_finish";
  check_mean(hessian, hessian.dim() > 0 ? hessian.size(0) : 0, kOp, "hessian");
  with_data(hessian, [&](auto* data) { finish_hessian(hessian.size(0), torch_parallel(), data); });
}

std::tuple<int64_t, int64_t> cross_update(Tensor cross, Tensor x_float, Tensor x,
                                          std::optional<Tensor> mask, int64_t tokens) {
  constexpr const char* kOp = "cross_update";
  Tensor kept, kept_float;
  std::optional<Tensor> kept_mask;
  const MatrixView rows = rows_of(x, kOp, "x", &kept);
  const MatrixView target = rows_of(x_float, kOp, "x_float", &kept_float);
  if (target.rows != rows.rows || target.cols != rows.cols) {
    fail(kOp, "x_float must have the shape of x, " + shape_of(x) + ", got " + shape_of(x_float));
  }
  check_mean(cross, rows.cols, kOp, "cross");
  check_tokens(tokens, kOp);
  const uint8_t* counted = bytes_of_mask(mask, rows.rows, kOp, &kept_mask);
  const Counts counts = with_data(cross, [&](auto* data) {
    return update_cross(kernels(kOp), target, rows, counted, tokens, torch_linear_algebra(),
                        torch_parallel(), data);
  });
  return {counts.counted, counts.dropped};
}

// ---- solvers ----

struct Layer {
  Format format;
  int64_t rows = 0, cols = 0;
  MatrixView weight;
  HessianView hessian;
};

Layer layer_of(const Tensor& weight, const Tensor& hessian, const std::vector<int64_t>& spec,
               const char* op) {
  Layer layer;
  check(parse_spec(spec, &layer.format, &layer.rows, &layer.cols), op);
  layer.weight = matrix_of(weight, layer.rows, layer.cols, op);
  check_mean(hessian, layer.cols, op, "hessian");
  layer.hessian = {hessian.const_data_ptr(), hessian.scalar_type() == ScalarType::Double,
                   layer.cols};
  return layer;
}

int64_t in_range(int64_t value, int64_t end, const char* op, const char* argument) {
  if (value < 0 || value >= end) {
    fail(op, std::string(argument) + " must be at least 0 and below " + std::to_string(end) +
                 ", got " + std::to_string(value));
  }
  return value;
}

double in_range(double value, double most, const char* op, const char* argument) {
  if (!(value >= 0.0 && value <= most)) {
    fail(op, std::string(argument) + " must be between 0 and " + std::to_string(most) + ", got " +
                 std::to_string(value));
  }
  return value;
}

constexpr int64_t kMostRounds = 1000;

std::tuple<std::vector<Tensor>, Tensor> gptq_quantize(
    Tensor weight, Tensor hessian, std::vector<int64_t> spec, int64_t order, double damping,
    int64_t scales, bool dynamic, int64_t sweeps, int64_t refits, std::optional<Tensor> cross,
    double alpha, std::optional<Tensor> exact, int64_t measured_rows, bool timed) {
  constexpr const char* kOp = "gptq_quantize";
  const Layer layer = layer_of(weight, hessian, spec, kOp);
  GptqOptions options;
  options.order = static_cast<ColumnOrder>(in_range(order, 3, kOp, "order"));
  options.scales = static_cast<ScaleChoice>(in_range(scales, 3, kOp, "scales"));
  options.dynamic = dynamic;
  options.sweeps = static_cast<int>(in_range(sweeps, kMostRounds, kOp, "sweeps"));
  options.refits = static_cast<int>(in_range(refits, kMostRounds, kOp, "refits"));
  options.alpha = in_range(alpha, 1.0, kOp, "alpha");
  options.measured_rows = measured_rows;
  options.damping = in_range(damping, kMostDamping, kOp, "damping");
  Tensor kept_cross, kept_exact;
  if (cross.has_value()) {
    check_mean(*cross, layer.cols, kOp, "cross");
    kept_cross = cross->scalar_type() == ScalarType::Float
                     ? *cross
                     : torch::stable::to(*cross, ScalarType::Float);
    options.cross = static_cast<const float*>(kept_cross.const_data_ptr());
  }
  if (exact.has_value()) {
    if ((exact->scalar_type() != ScalarType::Bool && exact->scalar_type() != ScalarType::Byte) ||
        exact->dim() != 2 || exact->size(0) != layer.rows || exact->size(1) != layer.cols ||
        !exact->is_cpu()) {
      fail(kOp, "exact must be a bool or uint8 CPU tensor of the weight's shape, got " +
                    std::string(name_of(exact->scalar_type())) + " " + shape_of(*exact));
    }
    kept_exact = as_contiguous(*exact);
    options.exact = static_cast<const uint8_t*>(kept_exact.const_data_ptr());
  }
  std::vector<void*> buffers;
  std::vector<Tensor> packed =
      empty_buffers(weight, layer.format, layer.rows, layer.cols, &buffers);
  GptqReport r;
  check(bitfold::gptq_quantize(kernels(kOp), torch_linear_algebra(), layer.format, layer.weight,
                               layer.hessian, options, buffers.data(), torch_parallel(), &r),
        kOp);
  if (!timed) r.seconds = {};
  // In the order of bitfold.solvers.GPTQ_REPORT.
  const double values[] = {
      r.loss,           r.damped,           r.feedback,       r.predicted, r.plain,
      r.plain_damped,   r.measured,         r.tracked,        r.damping,   r.dead,
      r.fp64,           r.fallback,         r.measured_rows,  r.refitted,  r.seconds.factor,
      r.seconds.scales, r.seconds.products, r.seconds.columns};
  Tensor report = torch::stable::new_empty(weight, {std::size(values)}, ScalarType::Double);
  std::copy(std::begin(values), std::end(values), static_cast<double*>(report.mutable_data_ptr()));
  return {packed, report};
}

std::tuple<std::vector<Tensor>, Tensor> refit_scales(std::vector<Tensor> packed,
                                                     std::vector<int64_t> spec, Tensor weight,
                                                     Tensor hessian, double damping,
                                                     int64_t sweeps) {
  constexpr const char* kOp = "refit_scales";
  unpack(packed, spec, kOp);
  const Layer layer = layer_of(weight, hessian, spec, kOp);
  std::vector<Tensor> refitted;
  std::vector<void*> buffers;
  for (const Tensor& buffer : packed) {
    refitted.push_back(torch::stable::clone(buffer));
    buffers.push_back(refitted.back().mutable_data_ptr());
  }
  double losses[2];
  check(refit_packed(kernels(kOp), torch_linear_algebra(), layer.format, layer.weight,
                     layer.hessian, in_range(damping, kMostDamping, kOp, "damping"),
                     static_cast<int>(in_range(sweeps, kMostRounds, kOp, "sweeps")), buffers.data(),
                     torch_parallel(), &losses[0], &losses[1]),
        kOp);
  Tensor report = torch::stable::new_empty(weight, {2}, ScalarType::Double);
  std::copy_n(losses, 2, static_cast<double*>(report.mutable_data_ptr()));
  return {refitted, report};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  m.impl("hessian_update", TORCH_BOX(&hessian_update));
  m.impl("hessian_finish", TORCH_BOX(&hessian_finish));
  m.impl("cross_update", TORCH_BOX(&cross_update));
  m.impl("gptq_quantize", TORCH_BOX(&gptq_quantize));
  m.impl("refit_scales", TORCH_BOX(&refit_scales));
}

}  // namespace bitfold::binding
