#include <vector>

#include "core/reference/reference.h"

namespace bitfold::reference {

void linear(const PackedView& view, const float* x, int64_t m, const float* bias, double* y) {
  std::vector<float> weight(static_cast<size_t>(view.rows * view.cols));
  dequantize(view, weight.data());
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < view.rows; ++r) {
      double sum = bias ? bias[r] : 0.0;
      for (int64_t c = 0; c < view.cols; ++c) {
        sum += static_cast<double>(x[i * view.cols + c]) *
               weight[static_cast<size_t>(r * view.cols + c)];
      }
      y[i * view.rows + r] = sum;
    }
  }
}

}  // namespace bitfold::reference
