// LLM.int8() on a GPU, run by the emulator, against the CPU: the same integers, so only the sum
// over outlier columns may be rounded otherwise.
#include "cuda/linear_mixed.h"

#include "cpu/mixed_product.h"
#include "products.h"

// What nvcc compiles, here as C++.
#include "cuda/linear_mixed.cu"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::Owned;
using testing::random_weights;
using testing::Values;

std::vector<float> floats_of(const std::vector<char>& bytes, FloatType dtype) {
  const size_t count = bytes.size() / static_cast<size_t>(size_of(dtype));
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    uint16_t half;
    if (dtype == FloatType::kFloat32) {
      memcpy(&values[i], &bytes[4 * i], 4);
    } else {
      memcpy(&half, &bytes[2 * i], 2);
      values[i] = testing::from_bits16(half, dtype);
    }
  }
  return values;
}

void check(const char* text, int64_t m, int64_t n, int64_t cols, FloatType dtype,
           const std::vector<int64_t>* columns, bool spoiled = false) {
  Owned w(format_of(text), n, cols, /*skew=*/cols % 2);
  w.fill_randomly(static_cast<unsigned>(cols + n));
  std::vector<float> values = random_weights(m * cols, 2);
  for (size_t i = 0; i < values.size(); i += 37) values[i] *= 20.0f;
  std::fill_n(values.begin(), cols, 0.0f);
  if (spoiled) {
    values[static_cast<size_t>((m - 1) * cols)] = INFINITY;
    values[static_cast<size_t>(cols + cols / 2)] = NAN;
  }
  const Values x(dtype, values), bias(dtype, random_weights(n, 3));
  const auto bytes = static_cast<size_t>(m * n * size_of(dtype));
  std::vector<char> cpu(bytes), gpu(bytes);
  const int64_t* given = columns ? columns->data() : nullptr;
  const int64_t count = columns ? static_cast<int64_t>(columns->size()) : 0;
  multiply_mixed(active_kernels(), w.view(), x.data(), m, bias.data(), dtype,
                 {6.0f, columns != nullptr, given, count}, cpu.data(), run_serially);
  std::vector<const void*> buffers;
  for (size_t i = 0; i < w.format().buffers(n, cols).size(); ++i) buffers.push_back(w.pointer(i));
  const cuda::DeviceWeight weight = cuda::make_device_weight(w.format(), n, cols, buffers.data());
  std::vector<double> scratch(
      static_cast<size_t>(cuda::linear_mixed_scratch_bytes(m, cols)) / 8 + 1, std::nan(""));
  const Status status = cuda::linear_mixed(weight, x.data(), m, bias.data(), dtype,
                                           {6.0f, columns != nullptr, given, count}, scratch.data(),
                                           gpu.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message;
  const std::vector<float> a = floats_of(gpu, dtype), b = floats_of(cpu, dtype);
  float size = 1e-3f;
  for (float v : b) size = std::isfinite(v) ? std::max(size, std::fabs(v)) : size;
  const float last = dtype == FloatType::kFloat32   ? 1e-5f
                     : dtype == FloatType::kFloat16 ? 1e-3f
                                                    : 8e-3f;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isfinite(b[i])) {
      ASSERT_NEAR(a[i], b[i], last * size)
          << text << " " << m << " " << n << " " << cols << " " << i;
    } else {
      ASSERT_EQ(std::isnan(a[i]), std::isnan(b[i])) << text << " " << i;
    }
  }
}

TEST(LinearMixedOnGpu, IsThatOfTheCpu) {
  for (const char* text : {"int8-row", "int8-row-dq", "int8-tensor"}) {
    for (const auto& [m, n, cols] : {std::tuple<int64_t, int64_t, int64_t>{1, 5, 64},
                                     {3, 70, 67},
                                     {17, 33, 300},
                                     {70, 3, 129}}) {
      for (FloatType dtype : {FloatType::kFloat32, FloatType::kFloat16, FloatType::kBFloat16})
        check(text, m, n, cols, dtype, nullptr);
    }
  }
}

TEST(LinearMixedOnGpu, GivenColumns) {
  std::vector<int64_t> many;
  for (int64_t c = 0; c < 700; c += 1 + c % 2) many.push_back(c);  // more than one launch takes
  check("int8-row", 5, 7, 700, FloatType::kFloat32, &many);
  const std::vector<int64_t> none, ends = {0, 99};
  check("int8-row", 5, 7, 100, FloatType::kFloat32, &none);
  check("int8-row", 5, 7, 100, FloatType::kFloat32, &ends);
}

TEST(LinearMixedOnGpu, WhatIsNotFinite) {
  const std::vector<int64_t> none;
  check("int8-row", 5, 7, 100, FloatType::kFloat32, nullptr, /*spoiled=*/true);
  check("int8-row", 5, 7, 100, FloatType::kFloat32, &none, /*spoiled=*/true);
}

TEST(LinearMixedOnGpu, MoreColumnsThanOneSumHolds) {
  check("int8-row", 1, 2, 65536 + 70, FloatType::kFloat32, nullptr);
}

}  // namespace
}  // namespace bitfold
