// The kernels themselves, run by the emulator: every format, against the bytes and floats of the
// CPU.
#include "cuda/kernels.h"

#include <algorithm>
#include <numeric>

#include "core/bitpack.h"
#include "core/scale_coding.h"
#include "support.h"

// What nvcc compiles, here as C++.
#include "cuda/dequantize.cu"
#include "cuda/encode.cu"
#include "cuda/hqq.cu"
#include "cuda/pack.cu"
#include "cuda/scales.cu"
#include "cuda/store_scales.cu"

namespace bitfold::cuda {
namespace {

using bitfold::testing::active_kernels;
using bitfold::testing::format_of;
using bitfold::testing::Owned;

std::vector<void*> buffers_of(const Owned& w, int64_t rows, int64_t cols) {
  std::vector<void*> buffers;
  for (size_t i = 0; i < w.format().buffers(rows, cols).size(); ++i)
    buffers.push_back(w.pointer(i));
  return buffers;
}

DeviceWeight weight_of(const Owned& w, int64_t rows, int64_t cols) {
  const std::vector<void*> buffers = buffers_of(w, rows, cols);
  return make_device_weight(w.format(), rows, cols,
                            std::vector<const void*>(buffers.begin(), buffers.end()).data());
}

constexpr FloatType kFloats[] = {FloatType::kFloat32, FloatType::kFloat16, FloatType::kBFloat16};

// `values` as they are stored in `dtype`.
std::vector<char> stored(const std::vector<float>& values, FloatType dtype) {
  std::vector<char> bytes(values.size() * static_cast<size_t>(size_of(dtype)));
  if (dtype == FloatType::kFloat32) {
    memcpy(bytes.data(), values.data(), bytes.size());
  } else {
    memcpy(bytes.data(), bitfold::testing::to_bits16(values, dtype).data(), bytes.size());
  }
  return bytes;
}

// A result that starts on a multiple of 16, or `skew` bytes after one, with guards on both sides.
class Result {
 public:
  Result(size_t bytes, size_t skew) : bytes_(bytes), memory_(bytes + 64, 0xee), skew_(skew) {
    start_ = memory_.data() + 16;
    start_ += (16 - reinterpret_cast<uintptr_t>(start_) % 16) % 16 + skew;
  }
  void* data() { return start_; }
  std::vector<char> get() const { return {start_, start_ + bytes_}; }
  bool is_guarded() const {
    return static_cast<uint8_t>(start_[-1]) == 0xee && static_cast<uint8_t>(start_[bytes_]) == 0xee;
  }

 private:
  size_t bytes_;
  std::vector<char> memory_;
  size_t skew_;
  char* start_;
};

TEST(CudaKernels, DequantizeEveryFormat) {
  for (const std::string& text : bitfold::testing::every_format()) {
    // Narrow ones too: a block takes a thousand rows of one unit.
    for (const auto& [rows, cols] :
         {std::pair<int64_t, int64_t>{5, 136}, {3, 61}, {37, 8}, {5, 8}, {5, 4}}) {
      Owned w(format_of(text), rows, cols);
      w.fill_randomly(static_cast<unsigned>(rows));
      const DeviceWeight weight = weight_of(w, rows, cols);
      for (FloatType dtype : kFloats) {
        const std::vector<char> expected = stored(w.decoded(), dtype);
        for (size_t skew : {size_t{0}, size_t{4}}) {
          Result out(expected.size(), skew);
          const Status status = dequantize(weight, dtype, out.data(), nullptr);
          ASSERT_TRUE(status.ok()) << text << ": " << status.message;
          ASSERT_EQ(out.get(), expected) << text << " [" << rows << ", " << cols << "] " << skew;
          ASSERT_TRUE(out.is_guarded()) << text;
        }
      }
    }
  }
}

__global__ void do_nothing() {}

TEST(CudaKernels, WhatCudaWouldRefuseIsRefused) {
  const auto is_run = [](const Launch& launch, size_t shared) {
    return run("do_nothing", do_nothing, launch, shared, nullptr).ok();
  };
  EXPECT_TRUE(is_run({1, 1, 256, 4}, kMaxSharedBytes));
  EXPECT_FALSE(is_run({1, 1, 256, 5}, 0));
  EXPECT_FALSE(is_run({1, 1, 32, 1}, kMaxSharedBytes + 1));
  EXPECT_TRUE(is_run({1, kMaxGridY, 1, 1}, 0));
  EXPECT_FALSE(is_run({1, kMaxGridY + 1, 1, 1}, 0));
  EXPECT_FALSE(is_run({kMaxGridX + 1, 1, 1, 1}, 0));
}

TEST(CudaKernels, EmbeddingWithEitherIndex) {
  const std::vector<int64_t> wide = {4, 0, 0, 2, 4, 1, 3};
  const std::vector<int32_t> narrow(wide.begin(), wide.end());
  const auto count = static_cast<int64_t>(wide.size());
  for (const std::string& text : bitfold::testing::some_formats()) {
    for (int64_t cols : {64, 61}) {
      Owned w(format_of(text), 5, cols);
      w.fill_randomly(3);
      const std::vector<float> all = w.decoded();
      std::vector<float> rows;
      for (int64_t i : wide) rows.insert(rows.end(), &all[0] + i * cols, &all[0] + (i + 1) * cols);
      const std::vector<char> expected = stored(rows, FloatType::kFloat16);
      for (bool is_wide : {true, false}) {
        const void* index = is_wide ? static_cast<const void*>(wide.data()) : narrow.data();
        Result out(expected.size(), 0);
        ASSERT_TRUE(embedding(weight_of(w, 5, cols), index, is_wide, count, FloatType::kFloat16,
                              out.data(), nullptr)
                        .ok());
        ASSERT_EQ(out.get(), expected) << text << " " << cols;
      }
    }
  }
}

// A matrix in `dtype` whose rows are `row_stride` apart, and its view.
struct Source {
  std::vector<char> bytes;
  MatrixView view;

  Source(const std::vector<float>& values, FloatType dtype, int64_t rows, int64_t cols,
         int64_t row_stride, bool transposed)
      : view{nullptr, dtype, rows, cols, transposed ? 1 : row_stride, transposed ? rows : 1} {
    std::vector<float> laid(static_cast<size_t>(transposed ? rows * cols : rows * row_stride));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c)
        laid[static_cast<size_t>(r * view.row_stride + c * view.col_stride)] =
            values[static_cast<size_t>(r * cols + c)];
    }
    bytes = stored(laid, dtype);
    view.data = bytes.data();
  }
};

void expect_folded_alike(const Format& format, Method method, const MatrixView& w) {
  Owned cpu(format, w.rows, w.cols), gpu(format, w.rows, w.cols);
  ASSERT_TRUE(cpu.quantize(active_kernels(), method, w).ok());
  std::vector<double> scratch(
      static_cast<size_t>(quantize_scratch_bytes(format, w.rows, w.cols)) / sizeof(double) + 1,
      std::nan(""));
  const Status status =
      quantize(format, method, w, buffers_of(gpu, w.rows, w.cols).data(), scratch.data(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message;
  ASSERT_EQ(gpu.bytes(), cpu.bytes())
      << format.to_string() << (method == Method::kRound ? " round [" : " search [") << w.rows
      << ", " << w.cols << "] dtype " << static_cast<int>(w.dtype) << " strides " << w.row_stride
      << " " << w.col_stride;
}

TEST(CudaKernels, FoldEveryFormatAsTheCpuDoes) {
  for (const std::string& text : bitfold::testing::every_format()) {
    const Format format = format_of(text);
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{2, 136}, {1, 61}}) {
      std::vector<float> values =
          bitfold::testing::random_weights(rows * cols, 7, bitfold::testing::Shape::kOutliers);
      std::fill_n(values.begin(), rows == 1 ? 0 : 64, 0.0f);
      const Source source(values, FloatType::kFloat32, rows, cols, cols, false);
      for (Method method : {Method::kRound, Method::kSearch})
        if (can_quantize(format, method)) expect_folded_alike(format, method, source.view);
    }
  }
}

TEST(CudaKernels, FoldAnyDtypeAndStrides) {
  const int64_t rows = 5, cols = 264;
  const std::vector<float> values = bitfold::testing::random_weights(rows * cols, 2);
  for (const char* text : {"nf4-nodq", "nf4", "fp4-g16", "nf3-g32-nodq", "nf2-g128", "nf4-g256",
                           "int8-row", "int4-g64", "int3-g64-fz", "int2-g64"}) {
    for (FloatType dtype : kFloats) {
      for (const auto& [stride, transposed] : {std::pair<int64_t, bool>{cols, false},
                                               {cols + 8, false},
                                               {cols + 3, false},
                                               {0, true}}) {
        const Source source(values, dtype, rows, cols, stride, transposed);
        expect_folded_alike(format_of(text), Method::kRound, source.view);
      }
    }
  }
}

TEST(CudaKernels, FoldExtremeMagnitudes) {
  for (const char* text : {"nf4-nodq", "nf4", "int8-row", "int4-g64", "int4-g64-fz",
                           "int4-g64-fz-dq", "int2-g64", "int8-tensor-zp"}) {
    for (float scale : {1e-38f, 1e-30f, 3e-6f, 1e6f, 1e30f}) {
      const std::vector<float> values =
          bitfold::testing::random_weights(4 * 72, 2, bitfold::testing::Shape::kUniform, scale);
      const Source source(values, FloatType::kFloat32, 4, 72, 72, false);
      for (Method method : {Method::kRound, Method::kSearch})
        if (can_quantize(format_of(text), method))
          expect_folded_alike(format_of(text), method, source.view);
    }
  }
}

TEST(CudaKernels, WhatIsNotFiniteDecodesToNan) {
  std::vector<float> values = bitfold::testing::random_weights(4 * 128, 2);
  values[128 + 70] = INFINITY;
  values[256 + 3] = NAN;
  const Source source(values, FloatType::kFloat32, 4, 128, 128, false);
  for (const char* text : {"nf4-nodq", "int8-row", "int4-g64", "int4-g64-fz", "int2-g64"}) {
    for (Method method : {Method::kRound, Method::kSearch}) {
      const Format format = format_of(text);
      Owned w(format, 4, 128);
      std::vector<double> scratch(static_cast<size_t>(quantize_scratch_bytes(format, 4, 128)) / 8);
      ASSERT_TRUE(quantize(format, method, source.view, buffers_of(w, 4, 128).data(),
                           scratch.data(), nullptr)
                      .ok());
      const std::vector<float> decoded = w.decoded();
      EXPECT_TRUE(std::isnan(decoded[128 + 70])) << text;
      EXPECT_TRUE(std::isnan(decoded[256 + 3])) << text;
      for (size_t i = 0; i < 128; ++i) EXPECT_TRUE(std::isfinite(decoded[i])) << text;
    }
  }
}

TEST(CudaKernels, DoubleQuantizationWhetherTheSumIsExactOrNot) {
  for (int64_t n : {0, 1, 255, 256, 257, 5000}) {
    for (float spread : {0.1f, 8.0f}) {
      std::vector<float> scales = bitfold::testing::random_weights(n, 1);
      for (size_t i = 0; i < scales.size(); ++i)
        scales[i] = std::fabs(scales[i]) * std::exp(spread * static_cast<float>(i % 7));
      const auto blocks = static_cast<size_t>((n + 255) / 256);
      std::vector<uint8_t> codes(scales.size()), expected_codes(scales.size());
      std::vector<float> absmax(blocks), expected_absmax(blocks), back(scales.size());
      std::vector<double> scratch(static_cast<size_t>(double_quantize_scratch_bytes()) / 8);
      float offset, expected_offset;
      bitfold::double_quantize(scales.data(), n, expected_codes.data(), expected_absmax.data(),
                               &expected_offset);
      ASSERT_TRUE(double_quantize(scales.data(), n, scratch.data(), codes.data(), absmax.data(),
                                  &offset, nullptr)
                      .ok());
      EXPECT_EQ(offset, expected_offset) << n << " " << spread;
      EXPECT_EQ(absmax, expected_absmax) << n << " " << spread;
      EXPECT_EQ(codes, expected_codes) << n << " " << spread;
      std::vector<float> expected_back(scales.size());
      bitfold::double_dequantize(codes.data(), absmax.data(), offset, n, expected_back.data());
      ASSERT_TRUE(
          double_dequantize(codes.data(), absmax.data(), &offset, n, back.data(), nullptr).ok());
      EXPECT_EQ(back, expected_back);
    }
  }
}

TEST(CudaKernels, PackAndUnpack) {
  std::mt19937 rng(3);
  for (int bits : {2, 3, 4, 8}) {
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {5, 37}, {3, 64}}) {
      std::vector<uint8_t> codes(static_cast<size_t>(rows * cols));
      for (uint8_t& code : codes) code = static_cast<uint8_t>(rng() & ((1u << bits) - 1));
      const int64_t row_bytes = packed_row_bytes(cols, bits);
      std::vector<uint8_t> expected(static_cast<size_t>(rows * row_bytes)), packed(expected.size());
      for (int64_t r = 0; r < rows; ++r)
        pack_row(codes.data() + r * cols, cols, bits, expected.data() + r * row_bytes);
      ASSERT_TRUE(pack_bits(codes.data(), rows, cols, bits, packed.data(), nullptr).ok());
      EXPECT_EQ(packed, expected) << bits;
      std::vector<uint8_t> back(codes.size());
      ASSERT_TRUE(unpack_bits(packed.data(), rows, cols, bits, back.data(), nullptr).ok());
      EXPECT_EQ(back, codes) << bits;
    }
  }
}

}  // namespace
}  // namespace bitfold::cuda
