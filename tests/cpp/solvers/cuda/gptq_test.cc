// GPTQ's kernels, run by the emulator, against the solver of the CPU.
#include "solvers/cuda/gptq.h"

#include "solvers/calibration.h"
#include "solvers/cuda/host_gpu.h"

// What nvcc compiles, here as C++.
#include "cuda/copy.cu"
#include "cuda/encode.cu"
#include "cuda/feedback.cu"
#include "cuda/hqq.cu"
#include "cuda/losses.cu"
#include "cuda/refit.cu"
#include "cuda/rounding.cu"
#include "cuda/scales.cu"
#include "cuda/statistics.cu"
#include "cuda/store_scales.cu"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::HostGpu;
using testing::loss_of;
using testing::Owned;
using testing::random_hessian;
using testing::random_weights;
using testing::solve;
using testing::Solved;

struct Case {
  const std::vector<float>& w;
  const std::vector<float>& hessian;
  int64_t rows;
};

Solved solve_on_gpu(const std::string& text, const Case& c, GptqOptions options) {
  const auto n = static_cast<int64_t>(c.w.size()) / c.rows;
  options.measured_rows = -1;
  const Format format = format_of(text);
  Owned packed(format, c.rows, n);
  std::vector<void*> buffers;
  for (size_t i = 0; i < format.buffers(c.rows, n).size(); ++i)
    buffers.push_back(packed.pointer(i));
  HostGpu gpu;
  Solved solved;
  solved.status =
      gptq_quantize(gpu.get(), format, {c.w.data(), FloatType::kFloat32, c.rows, n, n, 1},
                    {c.hessian.data(), false, n}, options, buffers.data(), &solved.report);
  if (!solved.status.ok()) return solved;
  solved.decoded = packed.decoded();
  solved.bytes = packed.bytes();
  return solved;
}

void expect_near(double a, double b, const std::string& what) {
  EXPECT_NEAR(a, b, 1e-3 * std::fabs(b) + 1e-12) << what;
}

// The same loss, the one that the decoded weights have, and the same story told of it.
void expect_alike(const std::string& text, const Case& c, const GptqOptions& options,
                  const std::string& what) {
  const Solved cpu = solve(text, c.w, c.hessian, c.rows, options, active_kernels());
  const Solved gpu = solve_on_gpu(text, c, options);
  ASSERT_TRUE(cpu.status.ok()) << cpu.status.message;
  ASSERT_TRUE(gpu.status.ok()) << gpu.status.message;
  const GptqReport &g = gpu.report, &r = cpu.report;
  expect_near(g.loss, r.loss, what + " loss");
  expect_near(g.damped, r.damped, what + " damped");
  expect_near(g.feedback, r.feedback, what + " feedback");
  expect_near(g.predicted, r.predicted, what + " predicted");
  expect_near(g.plain, r.plain, what + " plain");
  expect_near(g.plain_damped, r.plain_damped, what + " plain damped");
  expect_near(g.measured, g.damped, what + " measured");
  expect_near(g.tracked, g.damped, what + " tracked");
  EXPECT_EQ(g.measured_rows, r.measured_rows) << what;
  EXPECT_EQ(g.dead, r.dead) << what;
  EXPECT_EQ(g.damping, r.damping) << what;
  EXPECT_EQ(g.fallback, r.fallback) << what;
  int64_t flips = 0;
  for (size_t i = 0; i < cpu.bytes[0].size(); ++i) flips += cpu.bytes[0][i] != gpu.bytes[0][i];
  EXPECT_LE(flips, static_cast<int64_t>(cpu.bytes[0].size()) / 50 + 2) << what;
}

std::string name_of(const std::string& text, const GptqOptions& o) {
  return text + " order " + std::to_string(static_cast<int>(o.order)) + " scales " +
         std::to_string(static_cast<int>(o.scales)) + (o.dynamic ? " dynamic" : "") + " sweeps " +
         std::to_string(o.sweeps) + " refits " + std::to_string(o.refits);
}

TEST(GptqOnGpu, TheLossIsThatOfTheCpu) {
  const int64_t rows = 37, n = 301;  // blocks of rows and columns, sub-blocks and groups are ragged
  const std::vector<float> w = random_weights(rows * n, 41), h = random_hessian(n, 42, {17, 200});
  for (const char* text : {"int4-g64", "int3-g48-sym", "int2-g64", "int4-g16-fz", "int8-row", "nf4",
                           "nf4-nodq", "int4-g64-fz-dq", "nf3-g32", "fp4-g16-nodq"}) {
    for (ColumnOrder order :
         {ColumnOrder::kGiven, ColumnOrder::kDescending, ColumnOrder::kGroups}) {
      GptqOptions options;
      options.order = order;
      options.scales = order == ColumnOrder::kGiven ? ScaleChoice::kFactor : ScaleChoice::kDiagonal;
      expect_alike(text, {w, h, rows}, options, name_of(text, options));
    }
  }
}

TEST(GptqOnGpu, SeveralSections) {
  const int64_t rows = 5, n = 1100;
  const std::vector<float> w = random_weights(rows * n, 1), h = random_hessian(n, 2);
  for (int sweeps : {0, 1}) {
    GptqOptions options;
    options.order = ColumnOrder::kDescending;
    options.sweeps = sweeps;
    expect_alike("int4-g128", {w, h, rows}, options, name_of("int4-g128", options));
  }
}

TEST(GptqOnGpu, RangeScalesAndOneForTheTensor) {
  const int64_t rows = 9, n = 150;
  const std::vector<float> w = random_weights(rows * n, 3), h = random_hessian(n, 4);
  for (const char* text : {"int4-g64", "int8-tensor-zp", "int4-row", "nf4-nodq"}) {
    GptqOptions options;
    options.scales = ScaleChoice::kRange;
    expect_alike(text, {w, h, rows}, options, name_of(text, options));
  }
}

TEST(GptqOnGpu, SweepsNeverRaiseTheLoss) {
  const int64_t rows = 18, n = 200;
  const std::vector<float> w = random_weights(rows * n, 5), h = random_hessian(n, 6, {3});
  for (const char* text : {"int3-g64", "nf4", "int4-g32-fz"}) {
    double before = INFINITY;
    for (int sweeps : {0, 1, 3}) {
      GptqOptions options;
      options.sweeps = sweeps;
      expect_alike(text, {w, h, rows}, options, name_of(text, options));
      const double loss = solve_on_gpu(text, {w, h, rows}, options).report.damped;
      EXPECT_LE(loss, before);
      before = loss;
    }
  }
}

TEST(GptqOnGpu, RefitsNeverRaiseTheLoss) {
  for (const auto& [text, n] : {std::pair<std::string, int64_t>{"int3-g64", 200},
                                {"int4-g32-fz", 200},
                                {"int4-g64-fz-dq", 150},
                                {"nf4", 150},
                                {"nf4-nodq", 150},
                                {"int2-g16", 600},
                                {"int8-row", 100}}) {
    const int64_t rows = 18;
    const std::vector<float> w = random_weights(rows * n, 5), h = random_hessian(n, 6, {3});
    double before = INFINITY;
    for (int refits : {0, 1, 2}) {
      GptqOptions options;
      options.refits = refits;
      options.sweeps = text == "nf4" ? 0 : 1;
      expect_alike(text, {w, h, rows}, options, name_of(text, options));
      const GptqReport report = solve_on_gpu(text, {w, h, rows}, options).report;
      EXPECT_LE(report.damped, before) << text;
      if (refits > 0 && !format_of(text).double_quant) {
        EXPECT_GT(report.refitted, 0.0) << text;
      }
      before = report.damped;
    }
  }
}

TEST(GptqOnGpu, RefittingAPackedWeight) {
  const int64_t rows = 18, n = 150;
  const std::vector<float> w = random_weights(rows * n, 23), h = random_hessian(n, 24, {3});
  const MatrixView view{w.data(), FloatType::kFloat32, rows, n, n, 1};
  for (const char* text : {"int3-g64", "int4-g32-fz", "int4-g64-fz-dq", "nf4", "nf4-nodq",
                           "int2-g16", "int8-row", "int4-g64"}) {
    const Format format = format_of(text);
    double losses[2][2];
    for (bool on_gpu : {false, true}) {
      Owned packed(format, rows, n);
      ASSERT_TRUE(packed.quantize(active_kernels(), Method::kRound, view).ok());
      std::vector<void*> buffers;
      for (size_t i = 0; i < format.buffers(rows, n).size(); ++i)
        buffers.push_back(packed.pointer(i));
      HostGpu gpu;
      double *before = &losses[on_gpu][0], *after = &losses[on_gpu][1];
      const Status status =
          on_gpu ? refit_packed(gpu.get(), format, view, {h.data(), false, n}, 0.01, 2,
                                buffers.data(), before, after)
                 : refit_packed({active_kernels(), testing::naive_algebra(), run_serially}, format,
                                view, {h.data(), false, n}, 0.01, 2, buffers.data(), before, after);
      ASSERT_TRUE(status.ok()) << status.message;
      EXPECT_LE(*after, *before);
      const double added = *after - loss_of(w, packed.decoded(), h, rows);
      EXPECT_GE(added, -1e-3 * *after) << text;
    }
    expect_near(losses[1][0], losses[0][0], std::string(text) + " before");
    expect_near(losses[1][1], losses[0][1], std::string(text) + " after");
  }
}

TEST(GptqOnGpu, DynamicScales) {
  const int64_t rows = 20;
  for (const auto& [text, n] : {std::pair<std::string, int64_t>{"int4-g64", 330},
                                {"int3-g48-sym", 200},
                                {"int4-g32-fz", 100},
                                {"int4-g64-fz-dq", 200},
                                {"nf4", 200},
                                {"int4-g576", 650}}) {
    const std::vector<float> w = random_weights(rows * n, 7), h = random_hessian(n, 8, {5});
    for (ColumnOrder order : {ColumnOrder::kGiven, ColumnOrder::kGroups}) {
      GptqOptions options;
      options.order = order;
      options.dynamic = true;
      options.scales = order == ColumnOrder::kGiven ? ScaleChoice::kFactor : ScaleChoice::kRange;
      expect_alike(text, {w, h, rows}, options, name_of(text, options));
    }
  }
}

TEST(GptqOnGpu, WeightsStoredElsewhere) {
  const int64_t rows = 11, n = 140;
  const std::vector<float> w = random_weights(rows * n, 9), h = random_hessian(n, 10);
  std::vector<uint8_t> exact(w.size());
  for (size_t i = 0; i < exact.size(); i += 7) exact[i] = 1;
  for (const char* text : {"int4-g64", "nf4-nodq", "int4-g32-fz"}) {
    for (bool dynamic : {false, true}) {
      GptqOptions options;
      options.exact = exact.data();
      options.dynamic = dynamic;
      options.sweeps = 1;
      options.refits = 1;
      expect_alike(text, {w, h, rows}, options, name_of(text, options) + " exact");
    }
  }
}

TEST(GptqOnGpu, AnotherTarget) {
  const int64_t rows = 11, n = 96;
  const std::vector<float> w = random_weights(rows * n, 11), h = random_hessian(n, 12, {4});
  std::vector<float> cross = random_weights(n * n, 13);
  for (float& v : cross) v *= 0.01f;
  GptqOptions options;
  options.order = ColumnOrder::kDescending;
  options.cross = cross.data();
  options.alpha = 0.5;
  expect_alike("int4-g32", {w, h, rows}, options, "cross");
}

TEST(GptqOnGpu, AHessianThatNoDampingMends) {
  const int64_t rows = 6, n = 40;
  const std::vector<float> w = random_weights(rows * n, 14);
  std::vector<float> h(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) h[static_cast<size_t>(i * n + i)] = i % 2 ? 1.0f : -0.9f;
  expect_alike("int4-g16", {w, h, rows}, {}, "indefinite");
}

TEST(GptqOnGpu, SingularHessiansAreDamped) {
  const int64_t rows = 6, n = 60;
  const std::vector<float> w = random_weights(rows * n, 15);
  const std::vector<float> x = random_weights(3 * n, 16);  // of rank three
  std::vector<float> h(static_cast<size_t>(n * n));
  testing::naive_gemm<float>(true, false, n, n, 3, 1.0f, x.data(), n, x.data(), n, 0.0f, h.data(),
                             n);
  for (double damping : {0.01, 0.0}) {
    GptqOptions options;
    options.damping = damping;
    const Solved gpu = solve_on_gpu("int4-g16", {w, h, rows}, options);
    const Solved cpu = solve("int4-g16", w, h, rows, options, active_kernels());
    ASSERT_TRUE(gpu.status.ok()) << gpu.status.message;
    EXPECT_EQ(gpu.report.damping, cpu.report.damping);
    EXPECT_EQ(gpu.report.fp64, cpu.report.fp64);
    expect_near(gpu.report.plain, cpu.report.plain, "plain");
  }
}

TEST(GptqOnGpu, WeightsOfAnyDtypeAndStrides) {
  const int64_t rows = 7, n = 72;
  const std::vector<float> values = random_weights(rows * n, 17), h = random_hessian(n, 18);
  const std::vector<uint16_t> halves = testing::to_bits16(values, FloatType::kFloat16);
  std::vector<uint16_t> turned(halves.size());
  std::vector<float> exact;
  for (int64_t i = 0; i < rows * n; ++i) {
    turned[static_cast<size_t>(i % n * rows + i / n)] = halves[static_cast<size_t>(i)];
    exact.push_back(testing::from_bits16(halves[static_cast<size_t>(i)], FloatType::kFloat16));
  }
  const Format format = format_of("int4-g32");
  const Solved cpu = solve("int4-g32", exact, h, rows, {}, active_kernels());
  for (const MatrixView& view :
       {MatrixView{halves.data(), FloatType::kFloat16, rows, n, n, 1},
        MatrixView{turned.data(), FloatType::kFloat16, rows, n, 1, rows}}) {
    Owned packed(format, rows, n);
    std::vector<void*> buffers;
    for (size_t i = 0; i < format.buffers(rows, n).size(); ++i)
      buffers.push_back(packed.pointer(i));
    HostGpu gpu;
    GptqReport report;
    ASSERT_TRUE(gptq_quantize(gpu.get(), format, view, {h.data(), false, n}, {.timed = true},
                              buffers.data(), &report)
                    .ok());
    expect_near(report.loss, cpu.report.loss, "strides");
  }
}

TEST(GptqOnGpu, AHessianInFloat64) {
  const int64_t rows = 7, n = 72;
  const std::vector<float> w = random_weights(rows * n, 19), h = random_hessian(n, 20);
  const std::vector<double> wide(h.begin(), h.end());
  const Format format = format_of("int4-g32");
  Owned packed(format, rows, n);
  std::vector<void*> buffers;
  for (size_t i = 0; i < format.buffers(rows, n).size(); ++i) buffers.push_back(packed.pointer(i));
  HostGpu gpu;
  GptqReport report;
  ASSERT_TRUE(gptq_quantize(gpu.get(), format, {w.data(), FloatType::kFloat32, rows, n, n, 1},
                            {wide.data(), true, n}, {}, buffers.data(), &report)
                  .ok());
  const Solved cpu = solve("int4-g32", w, h, rows, {}, active_kernels());
  expect_near(report.loss, cpu.report.loss, "loss");
  expect_near(report.plain, cpu.report.plain, "plain");
}

std::string message_of(const std::string& text, const Case& c, const GptqOptions& options = {}) {
  return solve_on_gpu(text, c, options).status.message;
}

TEST(GptqOnGpu, BadInputIsNamedAsOnTheCpu) {
  const int64_t rows = 4, n = 32;
  const std::vector<float> w = random_weights(rows * n, 21), h = random_hessian(n, 22);
  std::vector<float> spoiled = w;
  spoiled[2 * 32 + 5] = INFINITY;
  spoiled[3 * 32 + 1] = NAN;
  EXPECT_EQ(message_of("int4-g32", {spoiled, h, rows}),
            "weight[2, 5] is infinite; every weight must be finite");
  std::vector<float> bad = h;
  bad[7 * 32 + 9] = NAN;
  EXPECT_EQ(message_of("int4-g32", {spoiled, bad, rows}),
            solve("int4-g32", spoiled, bad, rows, {}, active_kernels()).status.message);
  GptqOptions options;
  options.cross = bad.data();
  EXPECT_EQ(message_of("int4-g32", {w, h, rows}, options),
            solve("int4-g32", w, h, rows, options, active_kernels()).status.message);
  options = {};
  options.dynamic = true;
  options.order = ColumnOrder::kDescending;
  EXPECT_NE(message_of("int4-g32", {w, h, rows}, options).find("order must be none or groups"),
            std::string::npos);
  EXPECT_NE(message_of("kmeans4-row", {w, h, rows}).find("is solved on the CPU only"),
            std::string::npos);
  EXPECT_NE(message_of("int8-tensor", {w, h, rows}).find("is solved on the CPU only"),
            std::string::npos);
}

}  // namespace
}  // namespace bitfold
