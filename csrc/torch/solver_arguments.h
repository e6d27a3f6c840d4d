// Arguments of the calibrated solvers, checked the same way on the CPU and on a GPU.
#pragma once

#include <optional>

#include "solvers/awq.h"
#include "solvers/options.h"
#include "torch/checks.h"

namespace bitfold::binding {

// A mean [n, n], as `hessian` or `cross`.
void check_mean(const Tensor& mean, int64_t n, const char* op, const char* argument,
                const Place& place = kCpu);
// Activations [..., n] as rows; `kept` holds a copy where they must be made contiguous.
MatrixView rows_of(const Tensor& x, const char* op, const char* argument, Tensor* kept,
                   const Place& place = kCpu);
// The mask's bytes, one per row of x; `kept` owns them.
const uint8_t* bytes_of_mask(const std::optional<Tensor>& mask, int64_t rows, const char* op,
                             std::optional<Tensor>* kept, const Place& place = kCpu);
void check_tokens(int64_t tokens, const char* op);
// What cross_update is given: x as rows, and x_float, which must have its shape.
struct CrossRows {
  MatrixView x, x_float;
  Tensor kept_x, kept_float;
};
CrossRows cross_rows(const Tensor& x_float, const Tensor& x, const char* op,
                     const Place& place = kCpu);

// job(data) with the pointer in its own type.
template <class Job>
auto with_data(Tensor& mean, const Job& job) {
  return mean.scalar_type() == ScalarType::Float
             ? job(static_cast<float*>(mean.mutable_data_ptr()))
             : job(static_cast<double*>(mean.mutable_data_ptr()));
}

struct Layer : Folding {
  HessianView hessian;
};
Layer layer_of(const Tensor& weight, const Tensor& hessian, const std::vector<int64_t>& spec,
               const char* op, const Place& place = kCpu);

// Fails unless 0 <= value <= most.
int64_t in_range(int64_t value, int64_t most, const char* op, const char* argument);
double in_range(double value, double most, const char* op, const char* argument);
inline constexpr int64_t kMostRounds = 1000;

// The numbers that gptq_quantize is given.
GptqOptions gptq_options(const char* op, int64_t order, double damping, int64_t scales,
                         bool dynamic, int64_t sweeps, int64_t refits, double alpha,
                         int64_t measured_rows, bool timed);
// And the tensors, which `kept` holds.
void add_tensors(const Layer& layer, const std::optional<Tensor>& cross,
                 const std::optional<Tensor>& exact, const char* op, GptqOptions* options,
                 std::vector<Tensor>* kept, const Place& place = kCpu);
// A contiguous tensor of this dtype and shape.
const Tensor& checked(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
                      const char* argument, const std::string& op, const Place& place = kCpu);
// One entry of each list per reader, specs one after the other.
std::vector<AwqReader> awq_readers(
    const std::vector<Tensor>& weights, const std::vector<int64_t>& specs,
    const std::vector<int64_t>& methods, const std::vector<Tensor>& hessians,
    const std::vector<Tensor>& channels, const std::vector<Tensor>& magnitudes,
    const std::vector<int64_t>& tokens, int64_t size, const char* op, const Place& place = kCpu);

// In the order of bitfold.solvers.GPTQ_REPORT, and of bitfold.solvers.awq; on the CPU.
Tensor report_of(const GptqReport& report);
Tensor report_of(const AwqScale& found);
Tensor report_of(const AwqClip& found);

}  // namespace bitfold::binding
