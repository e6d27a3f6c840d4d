// AWQ's kernels, run by the emulator, against the searches of the CPU.
#include "solvers/cuda/awq.h"

#include "cuda/quantize.h"
#include "solvers/cuda/host_gpu.h"

// What nvcc compiles, here as C++.
#include "cuda/awq.cu"
#include "cuda/copy.cu"
#include "cuda/dequantize.cu"
#include "cuda/encode.cu"
#include "cuda/hqq.cu"
#include "cuda/rounding.cu"
#include "cuda/scales.cu"
#include "cuda/statistics.cu"
#include "cuda/store_scales.cu"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::HostGpu;
using testing::naive_algebra;
using testing::Owned;
using testing::random_hessian;
using testing::random_weights;

std::vector<void*> pointers(const Owned& packed) {
  std::vector<void*> all;
  for (size_t i = 0; i < packed.bytes().size(); ++i) all.push_back(packed.pointer(i));
  return all;
}

void expect_near(double a, double b, const std::string& what) {
  EXPECT_NEAR(a, b, 1e-3 * std::fabs(b)) << what;
}

Status clip(const std::string& text, const std::vector<float>& w, const std::vector<float>& h,
            int64_t rows, const uint8_t* exact, bool on_gpu, AwqClip* found, Owned* packed) {
  const Format format = format_of(text);
  const auto n = static_cast<int64_t>(w.size()) / rows;
  const MatrixView view{w.data(), FloatType::kFloat32, rows, n, n, 1};
  const Method method = text == "int8-row" ? Method::kRound : Method::kSearch;
  HostGpu gpu;
  return on_gpu ? awq_clip(gpu.get(), format, method, view, h.data(), exact,
                           pointers(*packed).data(), found)
                : awq_clip({active_kernels(), naive_algebra(), run_serially}, format, method, view,
                           h.data(), exact, pointers(*packed).data(), found);
}

TEST(AwqOnGpu, ClipsAsTheCpuDoes) {
  for (const auto& [text, rows, n] :
       {std::tuple<std::string, int64_t, int64_t>{"int3-g32", 19, 100},
        {"int4-g64-fz", 5, 150},
        {"nf4-nodq", 7, 130},
        {"nf4", 9, 130},
        {"int2-g16", 6, 70},
        {"int8-row", 3, 1100}}) {
    const std::vector<float> w = random_weights(rows * n, 1, testing::Shape::kLaplace),
                             h = random_hessian(n, 2);
    std::vector<uint8_t> marked(w.size());
    for (size_t i = 0; i < marked.size(); i += 5) marked[i] = 1;
    for (bool some : {false, true}) {
      const uint8_t* exact = some ? marked.data() : nullptr;
      const Format format = format_of(text);
      Owned cpu(format, rows, n), gpu(format, rows, n);
      AwqClip expected, found;
      ASSERT_TRUE(clip(text, w, h, rows, exact, false, &expected, &cpu).ok());
      const Status status = clip(text, w, h, rows, exact, true, &found, &gpu);
      ASSERT_TRUE(status.ok()) << status.message;
      EXPECT_EQ(found.groups, expected.groups) << text;
      EXPECT_NEAR(found.clipped, expected.clipped, 1.0 + 0.02 * expected.groups) << text;
      expect_near(found.before, expected.before, text + " before");
      expect_near(found.after, expected.after, text + " after");
      if (!exact) {
        expect_near(testing::loss_of(w, gpu.decoded(), h, rows),
                    testing::loss_of(w, cpu.decoded(), h, rows), text + " decoded");
      }
    }
  }
}

TEST(AwqOnGpu, ScalesAsTheCpuDoes) {
  const int64_t n = 64, channels = 70;
  std::vector<std::vector<float>> weights, hessians, magnitudes;
  std::vector<std::vector<int64_t>> channel;
  std::vector<AwqReader> readers;
  const char* formats[] = {"int3-g32", "nf4-nodq", "int4-row"};
  for (unsigned i = 0; i < 3; ++i) {
    const int64_t rows = 70 + 20 * i;
    weights.push_back(random_weights(rows * n, 3 + i));
    hessians.push_back(random_hessian(n, 13 + i));
    magnitudes.emplace_back();
    channel.emplace_back();
    for (int64_t c = 0; c < n; ++c) {
      magnitudes[i].push_back(std::sqrt(hessians[i][static_cast<size_t>(c * n + c)]));
      channel[i].push_back(c % 9 == 8 ? -1 : (c + i) % channels);
    }
    readers.push_back({format_of(formats[i]),
                       i == 1 ? Method::kRound : Method::kSearch,
                       {weights[i].data(), FloatType::kFloat32, rows, n, n, 1},
                       hessians[i].data(),
                       channel[i].data(),
                       magnitudes[i].data(),
                       100 + 10 * i});
  }
  std::vector<float> expected(channels), found(channels);
  AwqScale on_cpu, on_gpu;
  ASSERT_TRUE(awq_scale({active_kernels(), naive_algebra(), run_serially}, readers, channels,
                        expected.data(), &on_cpu)
                  .ok());
  HostGpu gpu;
  const Status status = awq_scale(gpu.get(), readers, channels, found.data(), &on_gpu);
  ASSERT_TRUE(status.ok()) << status.message;
  EXPECT_TRUE(on_gpu.better);
  EXPECT_EQ(on_gpu.alpha, on_cpu.alpha);
  EXPECT_EQ(on_gpu.by_weight, on_cpu.by_weight);
  expect_near(on_gpu.before, on_cpu.before, "before");
  expect_near(on_gpu.after, on_cpu.after, "after");
  for (size_t i = 0; i < found.size(); ++i) EXPECT_FLOAT_EQ(found[i], expected[i]);
}

TEST(AwqOnGpu, BadInputIsNamedAsOnTheCpu) {
  const int64_t rows = 4, n = 32;
  std::vector<float> w = random_weights(rows * n, 1), h = random_hessian(n, 2), magnitude(n, 1.0f);
  std::vector<int64_t> channel(n, 0);
  const AwqReader reader{format_of("int4-g32"),
                         Method::kRound,
                         {w.data(), FloatType::kFloat32, rows, n, n, 1},
                         h.data(),
                         channel.data(),
                         magnitude.data(),
                         10};
  float scale;
  AwqScale found;
  const auto messages_agree = [&] {
    HostGpu gpu;
    const Status on_gpu = awq_scale(gpu.get(), {reader, reader}, 1, &scale, &found);
    const Status on_cpu = awq_scale({active_kernels(), naive_algebra(), run_serially},
                                    {reader, reader}, 1, &scale, &found);
    EXPECT_FALSE(on_cpu.ok());
    EXPECT_EQ(on_gpu.message, on_cpu.message);
  };
  channel[3] = 1;
  messages_agree();
  channel[3] = 0;
  magnitude[2] = -1.0f;
  messages_agree();
  magnitude[2] = 1.0f;
  w[2 * 32 + 5] = NAN;
  messages_agree();
  h[5] = INFINITY;
  messages_agree();
  Owned packed(format_of("int4-g32"), rows, n);
  AwqClip clipped;
  EXPECT_EQ(clip("int4-g32", w, h, rows, nullptr, true, &clipped, &packed).message,
            clip("int4-g32", w, h, rows, nullptr, false, &clipped, &packed).message);
}

}  // namespace
}  // namespace bitfold
