// Every op, one after the other: the table of contents of the native side.
//
// packed: the buffers of one weight in the order of Format::buffers.
//
// spec: Format and logical shape as ints (code, grouping, group size, zero, double quantization,
// outliers, out, in).
//
// method: 0 round (absmax or min-max scale), 1 search (scale by squared error).
//
// accuracy: 0 auto, 1 fp32, 2 int8 (bitfold.ops.ACCURACY says what each one promises).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bitfold, m) {
  m.def("quantize(Tensor weight, int[] spec, int method) -> Tensor[]");
  m.def("dequantize(Tensor[] packed, int[] spec, ScalarType dtype) -> Tensor");
  // Two names for one product: the second carries no autograd formula, whose mere presence costs
  // microseconds a call.
  m.def("linear(Tensor x, Tensor[] packed, int[] spec, Tensor? bias, int accuracy) -> Tensor");
  m.def(
      "linear_nograd(Tensor x, Tensor[] packed, int[] spec, Tensor? bias, int accuracy) -> "
      "Tensor");
  // LLM.int8(): columns of x beyond the threshold, or the given ones, as floats.
  m.def(
      "linear_mixed(Tensor x, Tensor[] packed, int[] spec, Tensor? bias, float threshold, int[]? "
      "columns) -> Tensor");
  m.def("linear_grad_input(Tensor grad, Tensor[] packed, int[] spec) -> Tensor");
  m.def("embedding(Tensor indices, Tensor[] packed, int[] spec, ScalarType dtype) -> Tensor");
  // Formats with outliers: mask, the weight for the dense part, the last four buffers.
  m.def("choose_outliers(Tensor weight, int[] spec, int method, Tensor? importance) -> Tensor");
  m.def("set_aside_outliers(Tensor weight, int[] spec, Tensor mask) -> Tensor");
  m.def("fill_outliers(Tensor[] dense, int[] spec, Tensor weight, Tensor mask) -> Tensor[]");
  m.def("pack_bits(Tensor codes, int bits) -> Tensor");
  m.def("unpack_bits(Tensor packed, int bits, int rows, int cols) -> Tensor");
  m.def("double_quantize(Tensor scales) -> (Tensor, Tensor, Tensor)");
  m.def("double_dequantize(Tensor codes, Tensor absmax, Tensor offset) -> Tensor");
  m.def(
      "hqq_solve(Tensor weight, int[] spec, float p, float beta, float kappa, int iterations) -> "
      "Tensor[]");
  m.def("instruction_set() -> int");

  // Calibrated solvers; bitfold/solvers/ says what the arguments mean.
  m.def(
      "hessian_update(Tensor(a!) hessian, Tensor x, Tensor? mask, int tokens) -> (int counted, int "
      "dropped)");
  m.def("hessian_finish(Tensor(a!) hessian) -> ()");
  m.def(
      "cross_update(Tensor(a!) cross, Tensor x_float, Tensor x, Tensor? mask, int tokens) -> (int "
      "counted, int dropped)");
  m.def(
      "gptq_quantize(Tensor weight, Tensor hessian, int[] spec, int order, float damping, int "
      "scales, bool dynamic, int sweeps, int refits, Tensor? cross, float alpha, Tensor? exact, "
      "int "
      "measured_rows, bool timed) -> (Tensor[] packed, Tensor report)");
  m.def(
      "refit_scales(Tensor[] packed, int[] spec, Tensor weight, Tensor hessian, float damping, int "
      "sweeps) -> (Tensor[] packed, Tensor report)");
  // One entry per reader of the scaled channels; specs one after the other.
  m.def(
      "awq_scale(Tensor[] weights, int[] specs, int[] methods, Tensor[] hessians, Tensor[] "
      "channels, Tensor[] magnitudes, int[] tokens, int size) -> (Tensor scale, Tensor report)");
  m.def(
      "awq_clip(Tensor weight, Tensor hessian, int[] spec, int method, Tensor? exact) -> (Tensor[] "
      "packed, Tensor report)");
}
