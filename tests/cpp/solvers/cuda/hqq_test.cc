// HQQ's kernels, run by the emulator, against the solver of the CPU.
#include "solvers/cuda/hqq.h"

#include "solvers/cuda/host_gpu.h"
#include "support.h"

// What nvcc compiles, here as C++.
#include "cuda/encode.cu"
#include "cuda/hqq.cu"
#include "cuda/scales.cu"
#include "cuda/store_scales.cu"

namespace bitfold {
namespace {

using testing::format_of;
using testing::Owned;

std::vector<void*> pointers(const Owned& packed) {
  std::vector<void*> all;
  for (size_t i = 0; i < packed.bytes().size(); ++i) all.push_back(packed.pointer(i));
  return all;
}

double mean_power(const std::vector<float>& w, const std::vector<float>& back, double p) {
  double sum = 0.0;
  for (size_t i = 0; i < w.size(); ++i) sum += std::pow(std::fabs(double{w[i]} - back[i]), p);
  return sum / static_cast<double>(w.size());
}

// Powers of |r| are a few last places apart, so that a zero point may round to its neighbour: the
// same loss, hardly a code that differs.
TEST(HqqOnGpu, TheLossIsThatOfTheCpu) {
  for (const std::string& text : testing::dense_formats(testing::every_format())) {
    const Format format = format_of(text);
    if (!check_hqq(format, {}).ok()) continue;
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{5, 200}, {3, 61}, {16, 64}}) {
      std::vector<float> w =
          testing::random_weights(rows * cols, 7, testing::Shape::kLaplace, 0.02f);
      std::fill_n(w.begin(), 16, 0.0f);
      const MatrixView view{w.data(), FloatType::kFloat32, rows, cols, cols, 1};
      for (float p : {0.7f, 1.0f}) {
        HqqOptions options;
        options.p = p;
        Owned cpu(format, rows, cols), gpu(format, rows, cols);
        ASSERT_TRUE(hqq_solve({testing::active_kernels(), testing::naive_algebra(), run_serially},
                              format, options, view, pointers(cpu).data())
                        .ok());
        testing::HostGpu host;
        ASSERT_TRUE(hqq_solve(host.get(), format, options, view, pointers(gpu).data()).ok());
        const double expected = mean_power(w, cpu.decoded(), p);
        EXPECT_NEAR(mean_power(w, gpu.decoded(), p), expected, 1e-3 * expected) << text;
        EXPECT_EQ(gpu.bytes()[1], cpu.bytes()[1]) << text << ": the scales are those searched";
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
