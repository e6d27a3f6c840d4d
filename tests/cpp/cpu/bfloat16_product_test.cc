// Products on tiles, with AMX or an emulation of it, against the product in double.
#include "cpu/bfloat16_product.h"

#include "products.h"
#if defined(__x86_64__)
#include "cpu/amx_emulator.h"
#endif

namespace bitfold {
namespace {

using testing::format_of;
using testing::kIntegerLevels;
using testing::kRound;
using testing::Owned;
using testing::random_weights;
using testing::Values;

// Null where the CPU has not even what an emulation leaves to it.
const KernelTable* tile_kernels() {
#if defined(__x86_64__)
  const InstructionSet& best = instruction_sets().front();
  if (best.supported()) return best.table;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("amx-tile")) return nullptr;  // and the system does not let us
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16"))
    return nullptr;
  testing::emulate_amx();
  return best.table;
#else
  return nullptr;
#endif
}

class Bfloat16Product : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!kernels_) GTEST_SKIP() << "neither AMX that may be used nor AVX-512 VNNI and BF16 here";
  }
  const KernelTable& k() const { return *kernels_; }

 private:
  const KernelTable* kernels_ = tile_kernels();
};

// One plane is off by half a unit in the last of 8 digits, two of 16; the product of two second
// planes is left out.
void expect_near(const Owned& w, const Values& x, int64_t m, const Values* bias,
                 const std::vector<float>& y, Accuracy level, const std::string& what) {
  const PackedView view = w.view();
  const std::vector<float> weight = w.decoded();
  const double lost = level == Accuracy::kInt8 ? std::ldexp(2.01, -8) : std::ldexp(3.01, -16);
  const double rounding = (static_cast<double>(view.cols) + 20.0) * 1.01 * kRound;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < view.rows; ++r) {
      double value = bias ? bias->floats[static_cast<size_t>(r)] : 0.0, size = std::fabs(value);
      for (int64_t c = 0; c < view.cols; ++c) {
        const double product = double{x.floats[static_cast<size_t>(i * view.cols + c)]} *
                               weight[static_cast<size_t>(r * view.cols + c)];
        value += product;
        size += std::fabs(product);
      }
      double allowed = (lost + rounding) * size;
      allowed += 1.01 * testing::store_error(x.dtype, std::fabs(value) + allowed) + 1e-30;
      ASSERT_NEAR(y[static_cast<size_t>(i * view.rows + r)], value, allowed)
          << what << " " << testing::name_of(level) << " y[" << i << ", " << r << "] of " << m
          << "x" << view.rows << "x" << view.cols << " dtype " << int(x.dtype);
    }
  }
}

std::vector<float> product(const KernelTable& k, const Owned& w, const Values& x, int64_t m,
                           const Values* bias, Accuracy level,
                           const Parallel& parallel = run_serially) {
  return testing::written(x.dtype, m * w.view().rows, [&](void* y) {
    EXPECT_TRUE(multiply_bfloat16(k, w.view(), x.data(), m, bias ? bias->data() : nullptr, x.dtype,
                                  level == Accuracy::kInt8, y, parallel));
  });
}

void check(const KernelTable& k, const std::string& text, int64_t m, int64_t n, int64_t cols,
           FloatType dtype, Accuracy level) {
  Owned w(format_of(text), n, cols, /*skew=*/1);
  w.fill_randomly(static_cast<unsigned>(cols + n));
  const Values x(dtype, random_weights(m * cols, 2)), bias(dtype, random_weights(n, 3));
  expect_near(w, x, m, &bias, product(k, w, x, m, &bias, level), level, text);
}

TEST_F(Bfloat16Product, EveryShape) {
  for (int64_t cols : {1, 31, 33, 255, 257, 545})
    for (int64_t n : {1, 16, 31, 33})
      for (int64_t m : {1, 15, 17, 33, 64})
        for (Accuracy level : kIntegerLevels)
          check(k(), "nf4", m, n, cols, FloatType::kFloat32, level);
}

TEST_F(Bfloat16Product, EveryFormatAndDtype) {
  for (const std::string& text : testing::every_format())
    for (FloatType dtype : testing::kDtypes)
      for (Accuracy level : kIntegerLevels) check(k(), text, 18, 33, 300, dtype, level);
}

TEST_F(Bfloat16Product, NoBiasAndEmptyBatch) {
  Owned w(format_of("int4-g64"), 19, 70);
  w.fill_randomly(1);
  for (int64_t m : {0, 3}) {
    const Values x(FloatType::kFloat32, random_weights(m * 70, 2));
    expect_near(w, x, m, nullptr, product(k(), w, x, m, nullptr, Accuracy::kAuto), Accuracy::kAuto,
                "int4-g64");
  }
}

TEST_F(Bfloat16Product, TheSameBitsHoweverWorkIsSplit) {
  Owned w(format_of("nf4"), 300, 330);
  w.fill_randomly(1);
  const Values x(FloatType::kFloat32, random_weights(70 * 330, 2));
  for (Accuracy level : kIntegerLevels)
    EXPECT_EQ(product(k(), w, x, 70, nullptr, level),
              product(k(), w, x, 70, nullptr, level, testing::run_in_threads));
}

// A row's result does not depend on the rows beside it.
TEST_F(Bfloat16Product, ARowIsTheSameInEveryBatch) {
  const int64_t n = 33, cols = 330;
  Owned w(format_of("nf4"), n, cols);
  w.fill_randomly(1);
  const std::vector<float> rows = random_weights(70 * cols, 2);
  const Values all(FloatType::kFloat32, rows);
  const std::vector<float> y = product(k(), w, all, 70, nullptr, Accuracy::kAuto);
  for (int64_t m : {1, 16, 37}) {
    const Values last(FloatType::kFloat32, {rows.end() - m * cols, rows.end()});
    EXPECT_EQ(product(k(), w, last, m, nullptr, Accuracy::kAuto),
              std::vector<float>(y.end() - m * n, y.end()));
  }
}

TEST_F(Bfloat16Product, LeavesWhatFloatsAloneCanDo) {
  const int64_t cols = 300, m = 17;
  Owned w(format_of("nf4"), 5, cols);
  w.fill_randomly(1);
  for (float value : {NAN, INFINITY, -INFINITY, 1e31f, 1e-30f}) {
    std::vector<float> x = random_weights(m * cols, 2);
    // The last chunk of the last row, for it holds nothing else.
    for (int64_t c = 256; c < cols; ++c) x[static_cast<size_t>(16 * cols + c)] = 0.0f;
    x.back() = value;
    std::vector<float> y(static_cast<size_t>(m * 5), 99.0f);
    EXPECT_FALSE(multiply_bfloat16(k(), w.view(), x.data(), m, nullptr, FloatType::kFloat32, false,
                                   y.data(), run_serially))
        << value;
    EXPECT_EQ(y, std::vector<float>(y.size(), 99.0f));
  }
}

TEST_F(Bfloat16Product, WeightsNearTheEndsOfFloats) {
  Owned w(format_of("nf4-g32-nodq"), 5, 64);
  w.fill_randomly(1);
  auto* scales = reinterpret_cast<float*>(w.buffer(BufferRole::kScale));
  const float ends[] = {3.3e38f, 1e38f, 1.0f, 1e-20f, 1e-30f};
  for (int64_t r = 0; r < 5; ++r) scales[2 * r] = ends[r], scales[2 * r + 1] = ends[r];
  std::vector<float> x(64);
  x[0] = 1e-3f;
  const std::vector<float> weight = w.decoded();
  const std::vector<float> y =
      product(k(), w, Values(FloatType::kFloat32, x), 1, nullptr, Accuracy::kAuto);
  for (size_t r = 0; r < 5; ++r) {
    const float exact = 1e-3f * weight[64 * r];
    EXPECT_NEAR(y[r], exact, 5e-5f * std::fabs(exact)) << r;
  }
}

// The level's promise, in the mean over outputs, also with channels far larger than the rest.
TEST_F(Bfloat16Product, KeepsWhatTheLevelsPromise) {
  const int64_t m = 64, n = 32, cols = 1024;
  for (const char* text : {"nf4", "int4-g64", "int8-row", "int2-g64"}) {
    Owned w(format_of(text), n, cols);
    w.fill_randomly(2);
    std::vector<float> rows = random_weights(m * cols, 3);
    for (size_t i = 7; i < rows.size(); i += 128) rows[i] *= 20.0f;
    for (FloatType dtype : testing::kDtypes) {
      const Values x(dtype, rows);
      std::vector<double> exact(static_cast<size_t>(m * n));
      reference::linear(w.view(), x.floats.data(), m, nullptr, exact.data());
      for (Accuracy level : kIntegerLevels) {
        const auto y = testing::multiply(k(), w.view(), x, m, nullptr, level);
        double error = 0.0, size = 0.0;
        for (size_t i = 0; i < y.size(); ++i) {
          error += (y[i] - exact[i]) * (y[i] - exact[i]);
          size += exact[i] * exact[i];
        }
        const double promised = level == Accuracy::kInt8       ? 2.5e-2
                                : dtype == FloatType::kFloat32 ? 2e-4
                                                               : 2e-3;
        EXPECT_LE(std::sqrt(error / size), promised)
            << text << " " << testing::name_of(level) << " dtype " << int(dtype);
      }
    }
  }
}

// More rows than go at a time, and few enough left that they go as integers; outliers in both.
TEST_F(Bfloat16Product, HugeBatchesAndOutliers) {
  for (const char* text : {"nf4", "int4-g64-outliers10"}) {
    const int64_t m = 512 + 63, n = 19, cols = 130;
    Owned w(format_of(text), n, cols);
    ASSERT_TRUE(w.quantize(k(), Method::kRound, random_weights(n * cols, 1)).ok());
    const Values x(FloatType::kFloat32, random_weights(m * cols, 2));
    expect_near(w, x, m, nullptr, testing::multiply(k(), w.view(), x, m, nullptr, Accuracy::kAuto),
                Accuracy::kAuto, text);
  }
}

TEST_F(Bfloat16Product, NonFiniteScalesStayInTheirRow) {
  Owned w(format_of("nf4-nodq"), 40, 300);
  w.fill_randomly(1);
  auto* scales = reinterpret_cast<float*>(w.buffer(BufferRole::kScale));
  scales[3 * w.view().groups] = INFINITY;
  scales[5 * w.view().groups] = NAN;
  const Values x(FloatType::kFloat32, random_weights(20 * 300, 2));
  const std::vector<float> y = product(k(), w, x, 20, nullptr, Accuracy::kAuto);
  for (size_t i = 0; i < y.size(); ++i)
    EXPECT_EQ(std::isfinite(y[i]), i % 40 != 3 && i % 40 != 5) << i;
}

// Through the one entrance: many rows take tiles, a batch with NaN the float32 way, few rows
// integers as without tiles.
TEST_F(Bfloat16Product, LinearTakesTilesForManyRows) {
  const int64_t n = 35, cols = 200;
  Owned w(format_of("nf4"), n, cols);
  w.fill_randomly(1);
  for (FloatType dtype : testing::kDtypes) {
    const Values x(dtype, random_weights(64 * cols, 2)), bias(dtype, random_weights(n, 3));
    for (Accuracy level : kIntegerLevels) {
      const auto linear_of = [&](const KernelTable& table, int64_t m) {
        return testing::multiply(table, w.view(), x, m, &bias, level);
      };
      EXPECT_EQ(linear_of(k(), 64), product(k(), w, x, 64, &bias, level));
      KernelTable without = k();
      without.bfloat16 = nullptr;
      EXPECT_EQ(linear_of(k(), 63), linear_of(without, 63));
    }
  }
  std::vector<float> x = random_weights(64 * cols, 2);
  x[static_cast<size_t>(3 * cols)] = NAN;
  const auto y = testing::multiply(k(), w.view(), Values(FloatType::kFloat32, x), 64, nullptr,
                                   Accuracy::kAuto);
  for (size_t i = 0; i < y.size(); ++i)
    EXPECT_EQ(std::isnan(y[i]), static_cast<int64_t>(i) / n == 3) << i;
}

}  // namespace
}  // namespace bitfold
