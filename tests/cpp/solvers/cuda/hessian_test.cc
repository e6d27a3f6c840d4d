// Statistics on a GPU, run by the emulator, against those of the CPU.
#include "solvers/cuda/hessian.h"

#include "cuda/statistics.h"
#include "solvers/cuda/host_gpu.h"

// What nvcc compiles, here as C++.
#include "cuda/copy.cu"
#include "cuda/statistics.cu"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::HostGpu;
using testing::naive_algebra;
using testing::random_weights;

struct Rows {
  std::vector<float> values;
  int64_t n;
  MatrixView view(int64_t begin, int64_t end) const {
    return {values.data() + begin * n, FloatType::kFloat32, end - begin, n, n, 1};
  }
};

template <class T>
void expect_same_mean(const std::vector<T>& gpu, const std::vector<T>& cpu) {
  for (size_t i = 0; i < cpu.size(); ++i)
    ASSERT_NEAR(gpu[i], cpu[i], 1e-5 * (1.0 + std::fabs(cpu[i]))) << i;
}

template <class T>
void expect_same_hessian(int64_t n, bool masked, bool spoiled) {
  constexpr int64_t kTokens = 41, kCut = 19;
  Rows x{random_weights(kTokens * n, 5), n};
  if (spoiled) {
    x.values[static_cast<size_t>(3 * n)] = NAN;
    x.values[static_cast<size_t>(30 * n + n / 2)] = -INFINITY;
  }
  std::vector<uint8_t> mask(kTokens, 1);
  mask[0] = mask[3] = mask[17] = mask[40] = 0;
  const auto size = static_cast<size_t>(n * n);
  std::vector<T> gpu(size, std::numeric_limits<T>::quiet_NaN()), cpu = gpu;
  int64_t tokens = 0;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, kCut}, {kCut, kTokens}}) {
    const uint8_t* counted = masked ? mask.data() + begin : nullptr;
    HostGpu host;
    Counts on_gpu;
    ASSERT_TRUE(
        update_hessian(host.get(), x.view(begin, end), counted, tokens, gpu.data(), &on_gpu).ok());
    Counts on_cpu;
    ASSERT_TRUE(update_hessian({active_kernels(), naive_algebra(), run_serially},
                               x.view(begin, end), counted, tokens, cpu.data(), &on_cpu)
                    .ok());
    EXPECT_EQ(on_gpu.counted, on_cpu.counted);
    EXPECT_EQ(on_gpu.dropped, on_cpu.dropped);
    tokens += on_gpu.counted;
  }
  ASSERT_TRUE(finish_hessian(HostGpu().get(), n, gpu.data()).ok());
  ASSERT_TRUE(
      finish_hessian({active_kernels(), naive_algebra(), run_serially}, n, cpu.data()).ok());
  expect_same_mean(gpu, cpu);
}

TEST(HessianOnGpu, IsThatOfTheCpu) {
  for (int64_t n : {1, 5, 33, 131, 600}) {
    for (bool masked : {false, true}) {
      for (bool spoiled : {false, true}) {
        expect_same_hessian<float>(n, masked, spoiled);
        if (n < 200) expect_same_hessian<double>(n, masked, spoiled);
      }
    }
  }
}

TEST(HessianOnGpu, NothingToCountChangesNothing) {
  Rows x{random_weights(2 * 8, 1), 8};
  const std::vector<uint8_t> none(2, 0);
  std::vector<float> mean(64, 3.0f);
  for (int64_t rows : {0, 2}) {
    HostGpu host;
    Counts counts;
    ASSERT_TRUE(
        update_hessian(host.get(), x.view(0, rows), none.data(), 7, mean.data(), &counts).ok());
    EXPECT_EQ(counts.counted + counts.dropped, 0);
    EXPECT_EQ(mean, std::vector<float>(64, 3.0f));
  }
}

TEST(HessianOnGpu, InputsOf16Bits) {
  const int64_t n = 40, rows = 9;
  const std::vector<float> values = random_weights(rows * n, 2);
  for (FloatType dtype : {FloatType::kFloat16, FloatType::kBFloat16}) {
    const std::vector<uint16_t> bits = testing::to_bits16(values, dtype);
    const MatrixView x{bits.data(), dtype, rows, n, n, 1};
    std::vector<float> gpu(static_cast<size_t>(n * n)), cpu = gpu;
    HostGpu host;
    Counts counts;
    ASSERT_TRUE(update_hessian(host.get(), x, nullptr, 0, gpu.data(), &counts).ok());
    ASSERT_TRUE(update_hessian({active_kernels(), naive_algebra(), run_serially}, x, nullptr, 0,
                               cpu.data(), &counts)
                    .ok());
    expect_same_mean(gpu, cpu);
  }
}

template <class T>
void expect_same_cross() {
  const int64_t n = 70, rows = 21;
  Rows x{random_weights(rows * n, 3), n}, target{random_weights(rows * n, 4), n};
  x.values[static_cast<size_t>(2 * n + 1)] = INFINITY;
  target.values[static_cast<size_t>(5 * n)] = NAN;
  std::vector<uint8_t> mask(rows, 1);
  mask[2] = mask[9] = 0;
  std::vector<T> gpu(static_cast<size_t>(n * n), T{0.5}), cpu = gpu;
  HostGpu host;
  Counts counts;
  ASSERT_TRUE(update_cross(host.get(), target.view(0, rows), x.view(0, rows), mask.data(), 3,
                           gpu.data(), &counts)
                  .ok());
  Counts expected;
  ASSERT_TRUE(update_cross({active_kernels(), naive_algebra(), run_serially}, target.view(0, rows),
                           x.view(0, rows), mask.data(), 3, cpu.data(), &expected)
                  .ok());
  EXPECT_EQ(counts.counted, expected.counted);
  EXPECT_EQ(counts.dropped, expected.dropped);
  expect_same_mean(gpu, cpu);
}

TEST(HessianOnGpu, CrossIsThatOfTheCpu) {
  expect_same_cross<float>();
  expect_same_cross<double>();
}

}  // namespace
}  // namespace bitfold
