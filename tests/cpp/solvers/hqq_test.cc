#include "solvers/hqq.h"

#include "solvers/calibration.h"
#include "support.h"

namespace bitfold {
namespace {

using testing::format_of;
using testing::Owned;
using testing::random_weights;

const KernelTable& best() {
  Status status;
  return *active_instruction_set(&status)->table;
}

std::vector<void*> pointers(const Owned& packed) {
  std::vector<void*> all;
  for (size_t i = 0; i < packed.bytes().size(); ++i) all.push_back(packed.pointer(i));
  return all;
}

Status solve(const KernelTable& k, const std::string& text, int64_t rows, int64_t cols,
             const std::vector<float>& w, Owned* packed, const HqqOptions& options = {},
             const Parallel& parallel = run_serially) {
  return hqq_solve({k, testing::naive_algebra(), parallel}, format_of(text), options,
                   MatrixView{w.data(), FloatType::kFloat32, rows, cols, cols, 1},
                   pointers(*packed).data());
}

std::vector<std::string> usable_formats() {
  std::vector<std::string> usable;
  for (const std::string& text : testing::dense_formats(testing::every_format())) {
    const Format format = format_of(text);
    if (format.zero == Zero::kFloat && format.grouping != Grouping::kTensor) usable.push_back(text);
  }
  return usable;
}

double mean_power(const std::vector<float>& w, const std::vector<float>& back, double p) {
  double sum = 0.0;
  for (size_t i = 0; i < w.size(); ++i) sum += std::pow(std::fabs(double{w[i]} - back[i]), p);
  return sum / static_cast<double>(w.size());
}

// The published loop in float64 on min-max scales: zero points in units of codes, beta in units of
// weights, stopped when the mean over all groups grows.
std::vector<float> published(const std::vector<float>& w, size_t group, int bits) {
  const double top = (1 << bits) - 1;
  std::vector<double> step, zero;
  for (size_t at = 0; at < w.size(); at += group) {
    const auto [low, high] = std::minmax_element(w.begin() + at, w.begin() + at + group);
    step.push_back((double{*high} - *low) / top);
    zero.push_back(-*low / step.back());
  }
  const auto code = [&](size_t i) {
    return std::clamp(std::nearbyint(w[i] / step[i / group] + zero[i / group]), 0.0, top);
  };
  double beta = 10.0, least = 1e9;
  for (int iteration = 0; iteration < 20; ++iteration, beta *= 1.01) {
    std::vector<double> next(zero.size(), 0.0);
    double error = 0.0;
    for (size_t i = 0; i < w.size(); ++i) {
      const double q = code(i), s = step[i / group];
      const double r = w[i] - (q - zero[i / group]) * s;
      const double e = std::copysign(
          std::max(std::fabs(r) - std::pow(std::fabs(r) + 1e-30, -0.3) / beta, 0.0), r);
      next[i / group] += (q - (w[i] - e) / s) / static_cast<double>(group);
      error += std::fabs(r);
    }
    zero = next;
    if (error >= least) break;
    least = error;
  }
  std::vector<float> back(w.size());
  for (size_t i = 0; i < w.size(); ++i)
    back[i] = static_cast<float>((code(i) - zero[i / group]) * step[i / group]);
  return back;
}

TEST(Hqq, BeatsThePublishedLoop) {
  for (auto shape : {testing::Shape::kGaussian, testing::Shape::kLaplace, testing::Shape::kUniform,
                     testing::Shape::kOutliers}) {
    const std::vector<float> w = random_weights(32 * 256, 3, shape, 0.02f);
    for (int bits : {4, 3, 2}) {
      const std::string text = "int" + std::to_string(bits) + "-g64-fz";
      Owned packed(format_of(text), 32, 256);
      ASSERT_TRUE(solve(best(), text, 32, 256, w, &packed).ok());
      const std::vector<float> back = packed.decoded(), theirs = published(w, 64, bits);
      EXPECT_LT(testing::squared_error(w, back), testing::squared_error(w, theirs)) << text;
      EXPECT_LT(mean_power(w, back, 0.7), mean_power(w, theirs, 0.7)) << text << int(shape);
    }
  }
}

TEST(Hqq, LowersTheNormThatSearchLeaves) {
  const std::vector<float> w = random_weights(24 * 197, 4, testing::Shape::kLaplace, 0.02f);
  for (const std::string& text : usable_formats()) {
    if (format_of(text).double_quant) continue;  // scales of 8 bits blur the comparison
    Owned search(format_of(text), 24, 197), hqq(format_of(text), 24, 197);
    ASSERT_TRUE(search.quantize(best(), Method::kSearch, w).ok());
    ASSERT_TRUE(solve(best(), text, 24, 197, w, &hqq).ok());
    EXPECT_LE(mean_power(w, hqq.decoded(), 1.0), 1.0001 * mean_power(w, search.decoded(), 1.0))
        << text;
    EXPECT_LE(mean_power(w, hqq.decoded(), 0.7), 1.002 * mean_power(w, search.decoded(), 0.7))
        << text;
  }
}

TEST(Hqq, SameBitsOnEveryInstructionSetAndThreadCount) {
  for (const std::string& text : usable_formats()) {
    for (const auto& [rows, cols] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {5, 17}, {3, 300}, {29, 197}}) {
      const std::vector<float> w = random_weights(rows * cols, 5, testing::Shape::kOutliers, 0.02f);
      Owned base(format_of(text), rows, cols);
      ASSERT_TRUE(solve(portable::table, text, rows, cols, w, &base).ok());
      for (const InstructionSet& isa : instruction_sets()) {
        if (!isa.supported()) continue;
        Owned other(format_of(text), rows, cols);
        ASSERT_TRUE(
            solve(*isa.table, text, rows, cols, w, &other, {}, testing::run_in_threads).ok());
        EXPECT_EQ(other.bytes(), base.bytes()) << text << " " << isa.name;
      }
    }
  }
}

TEST(Hqq, HardWeights) {
  for (const std::string& text : usable_formats()) {
    const int64_t rows = 4, cols = 70;
    for (float value : {0.0f, 0.3f, -500.0f}) {
      const std::vector<float> w(static_cast<size_t>(rows * cols), value);
      Owned packed(format_of(text), rows, cols);
      ASSERT_TRUE(solve(best(), text, rows, cols, w, &packed).ok());
      for (float v : packed.decoded()) EXPECT_NEAR(v, value, std::fabs(value) * 1.5e-3) << text;
    }
    const std::vector<float> one = random_weights(rows * cols, 6);
    for (float scale : {1e-38f, 1e-20f, 1e20f, 1e38f}) {
      std::vector<float> w = one;
      for (float& v : w) v *= scale;
      Owned packed(format_of(text), rows, cols);
      ASSERT_TRUE(solve(best(), text, rows, cols, w, &packed).ok());
      for (float v : packed.decoded()) EXPECT_TRUE(std::isfinite(v)) << text << scale;
    }
  }
}

TEST(Hqq, RefusesWhatItCannotSolve) {
  const std::vector<float> w = random_weights(2 * 64, 7);
  for (const auto& [text, better] :
       std::vector<std::pair<std::string, std::string>>{{"int4-g64", "int4-g64-fz"},
                                                        {"nf4", "int4-g64-fz"},
                                                        {"int3-g32-sym", "int3-g32-fz"},
                                                        {"int2-tensor-fz", "int2-g64-fz"}}) {
    Owned packed(format_of(text), 2, 64);
    const Status status = solve(best(), text, 2, 64, w, &packed);
    EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
    EXPECT_NE(status.message.find("use " + better), std::string::npos) << status.message;
  }
  for (const HqqOptions& options :
       {HqqOptions{0.0f}, HqqOptions{1.5f}, HqqOptions{0.7f, -1.0f}, HqqOptions{0.7f, 10.0f, 0.5f},
        HqqOptions{0.7f, 10.0f, 1.01f, 0}}) {
    Owned packed(format_of("int4-g64-fz"), 2, 64);
    EXPECT_FALSE(solve(best(), "int4-g64-fz", 2, 64, w, &packed, options).ok());
  }
  std::vector<float> bad = w;
  bad[70] = NAN;
  Owned packed(format_of("int4-g64-fz"), 2, 64);
  const Status status = solve(best(), "int4-g64-fz", 2, 64, bad, &packed);
  EXPECT_NE(status.message.find("weight[1, 6]"), std::string::npos) << status.message;
}

// Weights clipped at the top of an 8-bit grid have any residual one likes, one to a lane.
TEST(Shrink, PowersAreThoseOfTheStandardLibrary) {
  const std::vector<float> scale(16, 1.0f), zero(16, 0.0f);
  for (const InstructionSet& isa : instruction_sets()) {
    if (!isa.supported()) continue;
    for (float p : {0.1f, 0.5f, 0.7f, 1.0f}) {
      for (float size = 1e-3f; size < 1e6f; size *= 1.37f) {
        std::vector<float> block(16, 255.0f + size);
        const double r = double{block[0]} - 255.0, beta = 3.0 * std::pow(r, p - 2.0) + 1.0;
        ShrinkSums sums;
        // In half steps, the residual would round; beyond them it is clipped.
        if (r < 0.51) continue;
        isa.table->shrink(8, block.data(), 1, scale.data(), zero.data(), p,
                          static_cast<float>(beta), &sums);
        const double expected = r * std::min(1.0, std::pow(r, p - 2.0) / beta);
        EXPECT_NEAR(sums.pull[3], expected, 3e-5 * expected)
            << isa.name << " p " << p << " r " << r;
        EXPECT_NEAR(sums.error[3], r, 1e-6 * r);
      }
    }
  }
}

TEST(Shrink, SumsOverExactlyTheSpan) {
  for (int64_t n : {1, 15, 17, 255, 256, 257, 700}) {
    std::vector<float> block = random_weights(16 * n, 8);
    const std::vector<float> scale(16, 0.4f), zero(16, 3.3f);
    ShrinkSums sums;
    best().shrink(3, block.data(), n, scale.data(), zero.data(), 0.7f, 10.0f, &sums);
    for (size_t lane = 0; lane < 16; ++lane) {
      double error = 0.0, pull = 0.0;
      for (size_t j = 0; j < static_cast<size_t>(n); ++j) {
        const double at = block[16 * j + lane] / 0.4 + 3.3;
        const double r = at - std::clamp(std::nearbyint(at), 0.0, 7.0), size = std::fabs(r) + 1e-12;
        error += size;
        pull += r * std::min(1.0, std::pow(size, -1.3) / 10.0);
      }
      EXPECT_NEAR(sums.error[lane], error, 1e-4 * error + 1e-4);
      EXPECT_NEAR(sums.pull[lane], pull, 1e-3 * static_cast<double>(n));
    }
  }
}

}  // namespace
}  // namespace bitfold
