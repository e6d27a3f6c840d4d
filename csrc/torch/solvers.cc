#include <optional>
#include <tuple>

#include "solvers/gptq.h"
#include "solvers/hessian.h"
#include "torch/linear_algebra.h"
#include "torch/solver_arguments.h"

namespace bitfold::binding {
namespace {

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
  std::optional<Tensor> kept_mask;
  const CrossRows rows = cross_rows(x_float, x, kOp);
  check_mean(cross, rows.x.cols, kOp, "cross");
  check_tokens(tokens, kOp);
  const uint8_t* counted = bytes_of_mask(mask, rows.x.rows, kOp, &kept_mask);
  const Counts counts = with_data(cross, [&](auto* data) {
    return update_cross(kernels(kOp), rows.x_float, rows.x, counted, tokens, torch_linear_algebra(),
                        torch_parallel(), data);
  });
  return {counts.counted, counts.dropped};
}

std::tuple<std::vector<Tensor>, Tensor> gptq_quantize(
    Tensor weight, Tensor hessian, std::vector<int64_t> spec, int64_t order, double damping,
    int64_t scales, bool dynamic, int64_t sweeps, int64_t refits, std::optional<Tensor> cross,
    double alpha, std::optional<Tensor> exact, int64_t measured_rows, bool timed) {
  constexpr const char* kOp = "gptq_quantize";
  const Layer layer = layer_of(weight, hessian, spec, kOp);
  GptqOptions options =
      gptq_options(kOp, order, damping, scales, dynamic, sweeps, refits, alpha, measured_rows);
  std::vector<Tensor> kept;
  add_tensors(layer, cross, exact, kOp, &options, &kept);
  std::vector<void*> buffers;
  std::vector<Tensor> packed =
      empty_buffers(weight, layer.format, layer.rows, layer.cols, &buffers);
  GptqReport report;
  check(bitfold::gptq_quantize(kernels(kOp), torch_linear_algebra(), layer.format, layer.weight,
                               layer.hessian, options, buffers.data(), torch_parallel(), &report),
        kOp);
  if (!timed) report.seconds = {};
  return {packed, report_of(report)};
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
  return {refitted, cpu_tensor(losses, std::size(losses))};
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
