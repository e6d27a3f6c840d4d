// The kernels of linear themselves, run by the emulator: every kind of format, odd shapes, several
// tiles, slabs and slices, against the scalar reference.
#include <algorithm>
#include <cmath>

#include "core/reference/reference.h"
#include "cuda/level_factor.h"
#include "cuda/linear.h"
#include "support.h"

// What nvcc compiles, here as C++.
#include "cuda/linear_any.cu"
#include "cuda/linear_mma.cuh"

namespace bitfold::cuda {
namespace {

using bitfold::testing::format_of;
using bitfold::testing::from_bits16;
using bitfold::testing::Owned;
using bitfold::testing::random_weights;
using bitfold::testing::to_bits16;

constexpr GpuLimits kHopper{132, 227 * 1024}, kSmall{3, 99 * 1024};

DeviceWeight weight_of(const Owned& w, int64_t rows, int64_t cols) {
  std::vector<const void*> buffers;
  for (size_t i = 0; i < w.format().buffers(rows, cols).size(); ++i)
    buffers.push_back(w.pointer(i));
  return make_device_weight(w.format(), rows, cols, buffers.data());
}

template <int kBits, FloatType kType, Decoding kDecoding = kOnlyDecoding<kBits>>
void run_mma(const MmaTask& task) {
  const auto kernel = task.plan.column_tiles == 1   ? linear_mma<kBits, kType, 1, kDecoding>
                      : task.plan.column_tiles == 2 ? linear_mma<kBits, kType, 2, kDecoding>
                      : task.plan.column_tiles == 4 ? linear_mma<kBits, kType, 4, kDecoding>
                                                    : linear_mma<kBits, kType, 8, kDecoding>;
  const Launch launch{task.plan.grid, 1, static_cast<uint32_t>(task.plan.warps) * 32, 1};
  emulator::allow_shared_memory(reinterpret_cast<const void*>(kernel), kHopper.shared_bytes);
  ASSERT_TRUE(
      run("linear_mma", kernel, launch, static_cast<size_t>(task.plan.shared_bytes), nullptr, task)
          .ok());
}

// Numbers of 16 bits that start at a multiple of 16 bytes, and the same as floats.
struct Numbers {
  std::vector<float> floats;
  std::vector<uint4> memory;

  Numbers(std::vector<float> values, FloatType type) : floats(std::move(values)) {
    const std::vector<uint16_t> bits = to_bits16(floats, type);
    memory.resize(bits.size() / 8 + 1);
    memcpy(memory.data(), bits.data(), bits.size() * 2);
    for (size_t i = 0; i < bits.size(); ++i) floats[i] = from_bits16(bits[i], type);
  }
};

template <FloatType kType>
void check(const std::string& text, int64_t m, int64_t rows, int64_t cols, const GpuLimits* gpu) {
  SCOPED_TRACE(text + " " + std::to_string(m) + "x" + std::to_string(rows) + "x" +
               std::to_string(cols) + (gpu ? " mma" : " any"));
  Owned w(format_of(text.c_str()), rows, cols);
  w.fill_randomly(static_cast<unsigned>(rows + cols));
  const PackedView view = w.view();
  const DeviceWeight weight = weight_of(w, rows, cols);
  const Numbers x(random_weights(m * cols, 7), kType), bias(random_weights(rows, 8), kType);
  std::vector<uint16_t> y(static_cast<size_t>(m * rows), 0x7fff);
  std::vector<float> partial;
  MmaPlan plan;
  if (gpu) {
    ASSERT_TRUE(plan_mma(view, m, *gpu, &plan));
    partial.assign(static_cast<size_t>(plan.partials(rows)), NAN);
    const MmaTask task{weight,
                       plan,
                       level_factor(weight, kType),
                       x.memory.data(),
                       bias.memory.data(),
                       y.data(),
                       plan.slices > 1 ? partial.data() : nullptr};
    const bool by_arithmetic = decoding_of(view) == Decoding::kArithmetic;
    const auto mma = view.bits == 8                    ? run_mma<8, kType>
                     : view.bits == 4 && by_arithmetic ? run_mma<4, kType, Decoding::kArithmetic>
                     : view.bits == 4                  ? run_mma<4, kType>
                     : view.bits == 3                  ? run_mma<3, kType>
                                                       : run_mma<2, kType>;
    mma(task);
  } else {
    ASSERT_TRUE(
        linear_any(weight, x.memory.data(), m, bias.memory.data(), kType, y.data(), nullptr).ok());
  }

  std::vector<float> dense(static_cast<size_t>(rows * cols));
  reference::dequantize(view, dense.data());
  const double ulp = kType == FloatType::kFloat16 ? std::ldexp(1.0, -11) : std::ldexp(1.0, -8);
  const double operands = !gpu || view.family == Family::kInteger ? 1e-5 : ulp;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      double want = bias.floats[static_cast<size_t>(r)], size = std::fabs(want);
      for (int64_t c = 0; c < cols; ++c) {
        const double product = double{x.floats[static_cast<size_t>(i * cols + c)]} *
                               dense[static_cast<size_t>(r * cols + c)];
        want += product;
        size += std::fabs(product);
      }
      const auto at = static_cast<size_t>(i * rows + r);
      double got = from_bits16(y[at], kType);
      if (!partial.empty()) {  // as add_slices
        got = bias.floats[static_cast<size_t>(r)];
        for (int s = 0; s < plan.slices; ++s)
          got += partial[static_cast<size_t>(s * m * rows) + at];
      }
      if (kType == FloatType::kFloat16 && std::fabs(want) > 6e4) continue;
      ASSERT_NEAR(got, want, std::fabs(want) * ulp * 1.01 + size * operands + 1e-6)
          << "y[" << i << ", " << r << "], slices: " << plan.slices;
    }
  }
}

TEST(LinearKernels, TensorCores) {
  for (const char* text :
       {"nf4", "int4-g64", "int4-row-fz", "int3-g64", "int2-g64", "int8-g64-zp"}) {
    check<FloatType::kFloat16>(text, 3, 21, 384, &kSmall);
    check<FloatType::kBFloat16>(text, 9, 16, 640, &kHopper);
  }
  check<FloatType::kFloat16>("int4-tensor", 17, 50, 352, &kSmall);
  check<FloatType::kFloat16>("nf4-nodq", 1, 1, 32, &kHopper);
  check<FloatType::kBFloat16>("nf3", 1, 100, 256, &kSmall);
}

TEST(LinearKernels, SlabsAndSlices) {
  check<FloatType::kFloat16>("int4-g64", 64, 16, 1024, &kSmall);
  check<FloatType::kFloat16>("int4-g64-dq", 1, 16, 4096, &kSmall);
}

TEST(LinearKernels, AnyFormatAndShape) {
  for (const char* text :
       {"nf4", "nf4-g32", "int4-row-fz", "int3-g64", "int2-g64", "int8-row", "kmeans4-row",
        "kmeans3-tensor", "nf4-outliers", "int3-g64-outliers50"}) {
    check<FloatType::kFloat16>(text, 3, 21, 384, nullptr);
    check<FloatType::kBFloat16>(text, 9, 37, 197, nullptr);
    check<FloatType::kBFloat16>(text, 1, 5, 136, nullptr);
  }
  check<FloatType::kFloat16>("int4-g64", 1, 1, 1, nullptr);
}

}  // namespace
}  // namespace bitfold::cuda
