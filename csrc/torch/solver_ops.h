// The solvers' ops, written once. On is where one runs: OnCpu in `_ops`, OnGpu in `_ops_cuda`.
// On::place_of(tensors) is where these must lie, and On(place, op).get() the Cpu or Gpu that a
// library function takes first: which of two overloads, argument-dependent lookup finds.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "solvers/hessian.h"
#include "torch/registration.h"
#include "torch/solver_arguments.h"

namespace bitfold::binding {

template <class On>
std::tuple<int64_t, int64_t> hessian_update(Tensor hessian, Tensor x, std::optional<Tensor> mask,
                                            int64_t tokens) {
  constexpr const char* kOp = "hessian_update";
  const Place place = On::place_of(hessian, x, mask);
  Tensor kept;
  std::optional<Tensor> kept_mask;
  const MatrixView rows = rows_of(x, kOp, "x", &kept, place);
  check_mean(hessian, rows.cols, kOp, "hessian", place);
  check_tokens(tokens, kOp);
  const uint8_t* counted = bytes_of_mask(mask, rows.rows, kOp, &kept_mask, place);
  const On on(place, kOp);
  Counts counts;
  check(with_data(hessian,
                  [&](auto* data) {
                    return update_hessian(on.get(), rows, counted, tokens, data, &counts);
                  }),
        kOp);
  return {counts.counted, counts.dropped};
}

template <class On>
void hessian_finish(Tensor hessian) {
  constexpr const char* kOp = "hessian_finish";
  const int64_t n = hessian.dim() > 0 ? hessian.size(0) : 0;
  const Place place = On::place_of(hessian);
  check_mean(hessian, n, kOp, "hessian", place);
  const On on(place, kOp);
  check(with_data(hessian, [&](auto* data) { return finish_hessian(on.get(), n, data); }), kOp);
}

template <class On>
std::tuple<int64_t, int64_t> cross_update(Tensor cross, Tensor x_float, Tensor x,
                                          std::optional<Tensor> mask, int64_t tokens) {
  constexpr const char* kOp = "cross_update";
  const Place place = On::place_of(cross, x_float, x, mask);
  std::optional<Tensor> kept_mask;
  const CrossRows rows = cross_rows(x_float, x, kOp, place);
  check_mean(cross, rows.x.cols, kOp, "cross", place);
  check_tokens(tokens, kOp);
  const uint8_t* counted = bytes_of_mask(mask, rows.x.rows, kOp, &kept_mask, place);
  const On on(place, kOp);
  Counts counts;
  check(with_data(cross,
                  [&](auto* data) {
                    return update_cross(on.get(), rows.x_float, rows.x, counted, tokens, data,
                                        &counts);
                  }),
        kOp);
  return {counts.counted, counts.dropped};
}

template <class On>
std::tuple<std::vector<Tensor>, Tensor> gptq_quantize(
    Tensor weight, Tensor hessian, std::vector<int64_t> spec, int64_t order, double damping,
    int64_t scales, bool dynamic, int64_t sweeps, int64_t refits, std::optional<Tensor> cross,
    double alpha, std::optional<Tensor> exact, int64_t measured_rows, bool timed) {
  constexpr const char* kOp = "gptq_quantize";
  const Place place = On::place_of(weight, hessian, cross, exact);
  const Layer layer = layer_of(weight, hessian, spec, kOp, place);
  GptqOptions options = gptq_options(kOp, order, damping, scales, dynamic, sweeps, refits, alpha,
                                     measured_rows, timed);
  std::vector<Tensor> kept;
  add_tensors(layer, cross, exact, kOp, &options, &kept, place);
  std::vector<void*> buffers;
  std::vector<Tensor> packed = empty_buffers(weight, layer, &buffers);
  const On on(place, kOp);
  GptqReport report;
  check(gptq_quantize(on.get(), layer.format, layer.weight, layer.hessian, options, buffers.data(),
                      &report),
        kOp);
  return {packed, report_of(report)};
}

template <class On>
std::tuple<std::vector<Tensor>, Tensor> refit_scales(std::vector<Tensor> packed,
                                                     std::vector<int64_t> spec, Tensor weight,
                                                     Tensor hessian, double damping,
                                                     int64_t sweeps) {
  constexpr const char* kOp = "refit_scales";
  const Place place = On::place_of(packed, weight, hessian);
  unpack_buffers(packed, spec, kOp, place);
  const Layer layer = layer_of(weight, hessian, spec, kOp, place);
  std::vector<Tensor> refitted;
  std::vector<void*> buffers;
  for (const Tensor& buffer : packed) {
    refitted.push_back(torch::stable::clone(buffer));
    buffers.push_back(refitted.back().mutable_data_ptr());
  }
  const On on(place, kOp);
  double losses[2];
  check(refit_packed(on.get(), layer.format, layer.weight, layer.hessian,
                     in_range(damping, kMostDamping, kOp, "damping"),
                     static_cast<int>(in_range(sweeps, kMostRounds, kOp, "sweeps")), buffers.data(),
                     &losses[0], &losses[1]),
        kOp);
  return {refitted, cpu_tensor(losses, std::size(losses))};
}

template <class On>
std::vector<Tensor> hqq_solve(Tensor weight, std::vector<int64_t> spec, double p, double beta,
                              double kappa, int64_t iterations) {
  constexpr const char* kOp = "hqq_solve";
  const Place place = On::place_of(weight);
  const Folding folding = folding_of(weight, spec, kOp, place);
  std::vector<void*> data;
  std::vector<Tensor> packed = empty_buffers(weight, folding, &data);
  const HqqOptions options{static_cast<float>(p), static_cast<float>(beta),
                           static_cast<float>(kappa), iterations};
  const On on(place, kOp);
  check(hqq_solve(on.get(), folding.format, options, folding.weight, data.data()), kOp);
  return packed;
}

template <class On>
std::tuple<Tensor, Tensor> awq_scale(std::vector<Tensor> weights, std::vector<int64_t> specs,
                                     std::vector<int64_t> methods, std::vector<Tensor> hessians,
                                     std::vector<Tensor> channels, std::vector<Tensor> magnitudes,
                                     std::vector<int64_t> tokens, int64_t size) {
  constexpr const char* kOp = "awq_scale";
  const Place place = On::place_of(weights, hessians, channels, magnitudes);
  const std::vector<AwqReader> readers = awq_readers(weights, specs, methods, hessians, channels,
                                                     magnitudes, tokens, size, kOp, place);
  Tensor scale = torch::stable::new_empty(weights[0], {size}, ScalarType::Float);
  const On on(place, kOp);
  AwqScale found;
  check(awq_scale(on.get(), readers, size, static_cast<float*>(scale.mutable_data_ptr()), &found),
        kOp);
  return {scale, report_of(found)};
}

template <class On>
std::tuple<std::vector<Tensor>, Tensor> awq_clip(Tensor weight, Tensor hessian,
                                                 std::vector<int64_t> spec, int64_t method,
                                                 std::optional<Tensor> exact) {
  constexpr const char* kOp = "awq_clip";
  const Place place = On::place_of(weight, hessian, exact);
  const Folding folding = folding_of(weight, spec, kOp, place);
  const int64_t rows = folding.weight.rows, cols = folding.weight.cols;
  const Tensor& mean = checked(hessian, ScalarType::Float, {cols, cols}, "hessian", kOp, place);
  const uint8_t* marked = nullptr;
  if (exact.has_value()) {
    checked(*exact, ScalarType::Byte, {rows, cols}, "exact", kOp, place);
    marked = static_cast<const uint8_t*>(exact->const_data_ptr());
  }
  std::vector<void*> data;
  std::vector<Tensor> packed = empty_buffers(weight, folding, &data);
  const On on(place, kOp);
  AwqClip found;
  check(awq_clip(on.get(), folding.format, method_of(method, kOp), folding.weight,
                 static_cast<const float*>(mean.const_data_ptr()), marked, data.data(), &found),
        kOp);
  return {packed, report_of(found)};
}

template <class On>
void register_solvers(torch::stable::detail::StableLibrary& m) {
  implement<"hessian_update", &hessian_update<On>>(m);
  implement<"hessian_finish", &hessian_finish<On>>(m);
  implement<"cross_update", &cross_update<On>>(m);
  implement<"gptq_quantize", &gptq_quantize<On>>(m);
  implement<"refit_scales", &refit_scales<On>>(m);
  implement<"hqq_solve", &hqq_solve<On>>(m);
  implement<"awq_scale", &awq_scale<On>>(m);
  implement<"awq_clip", &awq_clip<On>>(m);
}

}  // namespace bitfold::binding
