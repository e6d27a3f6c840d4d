#include "torch/solver_arguments.h"

#include <algorithm>

namespace bitfold::binding {

void check_mean(const Tensor& mean, int64_t n, const char* op, const char* argument,
                const Place& place) {
  if ((mean.scalar_type() != ScalarType::Float && mean.scalar_type() != ScalarType::Double) ||
      mean.dim() != 2 || mean.size(0) != n || mean.size(1) != n || !is_on(mean, place) ||
      !mean.is_contiguous()) {
    fail(op, std::string(argument) + " must be a contiguous float32 or float64 " + name_of(place) +
                 " tensor [in, in] = [" + std::to_string(n) + ", " + std::to_string(n) + "], got " +
                 what_came(mean));
  }
}

MatrixView rows_of(const Tensor& x, const char* op, const char* argument, Tensor* kept,
                   const Place& place) {
  if (x.dim() < 1 || x.size(x.dim() - 1) < 1 || !is_on(x, place)) {
    fail(op, std::string(argument) + " must be a " + name_of(place) + " tensor [..., in], got " +
                 what_came(x));
  }
  const FloatType dtype = float_type(x.scalar_type(), op, argument);
  const int64_t n = x.size(x.dim() - 1);
  *kept = as_contiguous(x);
  return {kept->const_data_ptr(), dtype, kept->numel() / n, n, n, 1};
}

const uint8_t* bytes_of_mask(const std::optional<Tensor>& mask, int64_t rows, const char* op,
                             std::optional<Tensor>* kept, const Place& place) {
  if (!mask.has_value()) return nullptr;
  if ((mask->scalar_type() != ScalarType::Bool && mask->scalar_type() != ScalarType::Byte) ||
      mask->numel() != rows || !is_on(*mask, place)) {
    fail(op, "mask must be a bool or uint8 " + name_of(place) +
                 " tensor with one entry per row of x (" + std::to_string(rows) + "), got " +
                 what_came(*mask));
  }
  *kept = as_contiguous(*mask);
  return static_cast<const uint8_t*>((*kept)->const_data_ptr());
}

void check_tokens(int64_t tokens, const char* op) {
  if (tokens < 0) {
    fail(op, "tokens must be the number of rows in the mean so far, got " + std::to_string(tokens));
  }
}

CrossRows cross_rows(const Tensor& x_float, const Tensor& x, const char* op, const Place& place) {
  CrossRows rows;
  rows.x = rows_of(x, op, "x", &rows.kept_x, place);
  rows.x_float = rows_of(x_float, op, "x_float", &rows.kept_float, place);
  if (rows.x_float.rows != rows.x.rows || rows.x_float.cols != rows.x.cols) {
    fail(op, "x_float must have the shape of x, " + shape_of(x) + ", got " + shape_of(x_float));
  }
  return rows;
}

Layer layer_of(const Tensor& weight, const Tensor& hessian, const std::vector<int64_t>& spec,
               const char* op, const Place& place) {
  const Folding folding = folding_of(weight, spec, op, place);
  const int64_t n = folding.weight.cols;
  check_mean(hessian, n, op, "hessian", place);
  return {folding, {hessian.const_data_ptr(), hessian.scalar_type() == ScalarType::Double, n}};
}

int64_t in_range(int64_t value, int64_t most, const char* op, const char* argument) {
  if (value < 0 || value > most) {
    fail(op, std::string(argument) + " must be between 0 and " + std::to_string(most) + ", got " +
                 std::to_string(value));
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

GptqOptions gptq_options(const char* op, int64_t order, double damping, int64_t scales,
                         bool dynamic, int64_t sweeps, int64_t refits, double alpha,
                         int64_t measured_rows, bool timed) {
  GptqOptions options;
  options.order = static_cast<ColumnOrder>(in_range(order, 2, op, "order"));
  options.scales = static_cast<ScaleChoice>(in_range(scales, 2, op, "scales"));
  options.dynamic = dynamic;
  options.sweeps = static_cast<int>(in_range(sweeps, kMostRounds, op, "sweeps"));
  options.refits = static_cast<int>(in_range(refits, kMostRounds, op, "refits"));
  options.alpha = in_range(alpha, 1.0, op, "alpha");
  options.measured_rows = measured_rows;
  options.timed = timed;
  options.damping = in_range(damping, kMostDamping, op, "damping");
  return options;
}

void add_tensors(const Layer& layer, const std::optional<Tensor>& cross,
                 const std::optional<Tensor>& exact, const char* op, GptqOptions* options,
                 std::vector<Tensor>* kept, const Place& place) {
  if (cross.has_value()) {
    check_mean(*cross, layer.weight.cols, op, "cross", place);
    kept->push_back(cross->scalar_type() == ScalarType::Float
                        ? *cross
                        : torch::stable::to(*cross, ScalarType::Float));
    options->cross = static_cast<const float*>(kept->back().const_data_ptr());
  }
  if (exact.has_value()) {
    if ((exact->scalar_type() != ScalarType::Bool && exact->scalar_type() != ScalarType::Byte) ||
        exact->dim() != 2 || exact->size(0) != layer.weight.rows ||
        exact->size(1) != layer.weight.cols || !is_on(*exact, place)) {
      fail(op, "exact must be a bool or uint8 " + name_of(place) +
                   " tensor of the weight's shape, got " + what_came(*exact));
    }
    kept->push_back(as_contiguous(*exact));
    options->exact = static_cast<const uint8_t*>(kept->back().const_data_ptr());
  }
}

const Tensor& checked(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
                      const char* argument, const std::string& op, const Place& place) {
  const bool fits =
      tensor.scalar_type() == dtype && is_on(tensor, place) && tensor.is_contiguous() &&
      std::equal(tensor.sizes().begin(), tensor.sizes().end(), shape.begin(), shape.end());
  if (fits) return tensor;
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  fail(op.c_str(), std::string(argument) + " must be a contiguous " + name_of(dtype) + " " +
                       name_of(place) + " tensor [" + wanted + "], got " + what_came(tensor));
}

std::vector<AwqReader> awq_readers(
    const std::vector<Tensor>& weights, const std::vector<int64_t>& specs,
    const std::vector<int64_t>& methods, const std::vector<Tensor>& hessians,
    const std::vector<Tensor>& channels, const std::vector<Tensor>& magnitudes,
    const std::vector<int64_t>& tokens, int64_t size, const char* op_name, const Place& place) {
  const size_t count = weights.size();
  if (count == 0) fail(op_name, "there must be at least one reader of the scaled channels");
  if (specs.size() != count * kSpecLength || methods.size() != count || hessians.size() != count ||
      channels.size() != count || magnitudes.size() != count || tokens.size() != count) {
    fail(op_name,
         "there must be one spec, method, Hessian, channel map, mean |x| and number of tokens "
         "for each of the " +
             std::to_string(count) + " weights");
  }
  if (size < 1 || size > kMaxWeights)
    fail(op_name, "channels must be at least 1, got " + std::to_string(size));
  std::vector<AwqReader> readers(count);
  for (size_t i = 0; i < count; ++i) {
    const std::string op = std::string(op_name) + ": reader " + std::to_string(i);
    const auto* spec = specs.data() + i * kSpecLength;
    const Folding folding = folding_of(weights[i], {spec, spec + kSpecLength}, op.c_str(), place);
    const int64_t cols = folding.weight.cols;
    AwqReader& reader = readers[i];
    reader.format = folding.format;
    reader.method = method_of(methods[i], op.c_str());
    reader.weight = folding.weight;
    reader.hessian = static_cast<const float*>(
        checked(hessians[i], ScalarType::Float, {cols, cols}, "hessian", op, place)
            .const_data_ptr());
    reader.channel = static_cast<const int64_t*>(
        checked(channels[i], ScalarType::Long, {cols}, "channel", op, place).const_data_ptr());
    reader.magnitude = static_cast<const float*>(
        checked(magnitudes[i], ScalarType::Float, {cols}, "mean_abs", op, place).const_data_ptr());
    reader.tokens = tokens[i];
  }
  return readers;
}

Tensor report_of(const AwqScale& found) {
  const double values[] = {found.better ? 1.0 : 0.0, found.alpha, found.by_weight ? 1.0 : 0.0,
                           found.before, found.after};
  return cpu_tensor(values, std::size(values));
}

Tensor report_of(const AwqClip& found) {
  const double values[] = {static_cast<double>(found.groups), static_cast<double>(found.clipped),
                           found.before, found.after};
  return cpu_tensor(values, std::size(values));
}

Tensor report_of(const GptqReport& r) {
  const double values[] = {
      r.loss,           r.damped,           r.feedback,       r.predicted, r.plain,
      r.plain_damped,   r.measured,         r.tracked,        r.damping,   r.dead,
      r.fp64,           r.fallback,         r.measured_rows,  r.refitted,  r.seconds.factor,
      r.seconds.scales, r.seconds.products, r.seconds.columns};
  return cpu_tensor(values, std::size(values));
}

}  // namespace bitfold::binding
