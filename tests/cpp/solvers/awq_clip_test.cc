#include "solvers/awq.h"

#include "solvers/calibration.h"

namespace bitfold {
namespace {

using testing::format_of;
using testing::naive_algebra;
using testing::Owned;
using testing::random_hessian;
using testing::random_weights;

const KernelTable& best() {
  Status status;
  return *active_instruction_set(&status)->table;
}

MatrixView view_of(const std::vector<float>& w, int64_t rows, int64_t cols) {
  return {w.data(), FloatType::kFloat32, rows, cols, cols, 1};
}

struct Clipped {
  std::vector<float> decoded;
  std::vector<std::vector<uint8_t>> bytes;
  AwqClip report;
  Status status;
};

Clipped clip(const std::string& text, const std::vector<float>& w, const std::vector<float>& h,
             int64_t rows, const KernelTable& k, Method method = Method::kSearch,
             const uint8_t* exact = nullptr, const Parallel& parallel = run_serially) {
  const auto cols = static_cast<int64_t>(w.size()) / rows;
  Owned packed(format_of(text), rows, cols);
  std::vector<void*> buffers;
  for (size_t i = 0; i < packed.bytes().size(); ++i) buffers.push_back(packed.pointer(i));
  Clipped clipped;
  clipped.status =
      awq_clip({k, naive_algebra(), parallel}, packed.format(), method, view_of(w, rows, cols),
               h.data(), exact, buffers.data(), &clipped.report);
  if (!clipped.status.ok()) return clipped;
  clipped.decoded = packed.decoded();
  clipped.bytes = packed.bytes();
  return clipped;
}

// e H e of a row over the columns [begin, end), in tiles of 512.
double loss_of_span(const float* w, const float* q, const std::vector<float>& h, int64_t n,
                    int64_t begin, int64_t end) {
  double loss = 0.0;
  for (int64_t low = begin; low < end; low += 512) {
    const int64_t high = std::min(end, low + 512);
    for (int64_t i = low; i < high; ++i) {
      for (int64_t j = low; j < high; ++j) {
        loss += (double{w[i]} - q[i]) * h[static_cast<size_t>(i * n + j)] * (double{w[j]} - q[j]);
      }
    }
  }
  return loss;
}

std::vector<std::string> usable_formats() {
  std::vector<std::string> usable;
  for (const std::string& text : testing::dense_formats(testing::some_formats())) {
    const Format format = format_of(text);
    if (format.family() != Family::kLearnedCodebook && format.grouping != Grouping::kTensor)
      usable.push_back(text);
  }
  return usable;
}

// The weights, not what was cut off of them, on the grids that `packed` has.
std::vector<float> rounded(const std::vector<float>& w, const PackedView& packed) {
  std::vector<float> out(w.size());
  for (size_t i = 0; i < w.size(); ++i) {
    const auto r = static_cast<int64_t>(i) / packed.cols, c = static_cast<int64_t>(i) % packed.cols;
    const float scale = scale_of(packed, r, c / packed.group_size);
    if (packed.family == Family::kInteger) {
      const float zero = zero_of(packed, r, c / packed.group_size);
      const float top = static_cast<float>((1 << packed.bits) - 1);
      out[i] = (std::clamp(std::nearbyint(w[i] / scale + zero), 0.0f, top) - zero) * scale;
      continue;
    }
    const auto off = [&](float level) { return std::fabs(w[i] - level * scale); };
    const float* last = packed.levels + (1 << packed.bits);
    out[i] = scale * *std::min_element(packed.levels, last,
                                       [&](float a, float b) { return off(a) < off(b); });
  }
  return out;
}

// Every candidate as the weights that it stands for, all groups cut alike.
std::vector<std::vector<float>> candidates(const Format& format, Method method,
                                           const std::vector<float>& w, int64_t rows) {
  const auto cols = static_cast<int64_t>(w.size()) / rows;
  const int64_t size = format.grouping == Grouping::kGroup ? format.group_size : cols;
  std::vector<std::vector<float>> all;
  for (int step = 0; step < 10; ++step) {
    std::vector<float> cut = w;
    const float share = 1.0f - static_cast<float>(step) / 20.0f;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t at = 0; at < cols; at += size) {
        float *first = cut.data() + r * cols + at,
              *last = cut.data() + r * cols + std::min(cols, at + size);
        float largest = 0.0f;
        for (float* v = first; v < last; ++v) largest = std::max(largest, std::fabs(*v));
        for (float* v = first; v < last; ++v)
          *v = std::clamp(*v, -share * largest, share * largest);
      }
    }
    Owned packed(format, rows, cols);
    EXPECT_TRUE(packed.quantize(best(), step == 0 ? method : Method::kRound, cut).ok());
    all.push_back(rounded(w, packed.view()));
  }
  return all;
}

TEST(AwqClip, TakesTheBestCandidateOfEachGroup) {
  for (const std::string& text : usable_formats()) {
    const Format format = format_of(text);
    if (format.double_quant) continue;  // scales of 8 bits come out a little different
    for (Method method : {Method::kRound, Method::kSearch}) {
      const int64_t rows = 19, n = text == "int8-row" ? 600 : 197;
      const std::vector<float> w = random_weights(rows * n, 3, testing::Shape::kLaplace, 0.02f);
      const std::vector<float> h = random_hessian(n, 4);
      const auto all = candidates(format, method, w, rows);
      const Clipped found = clip(text, w, h, rows, best(), method);
      ASSERT_TRUE(found.status.ok()) << found.status.message;
      const int64_t size = format.grouping == Grouping::kGroup ? format.group_size : n;
      double before = 0.0, after = 0.0;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t at = 0; at < n; at += size) {
          const int64_t end = std::min(n, at + size);
          std::vector<double> losses;
          for (const std::vector<float>& one : all)
            losses.push_back(loss_of_span(&w[r * n], &one[r * n], h, n, at, end));
          const double least = *std::min_element(losses.begin(), losses.end());
          const double mine = loss_of_span(&w[r * n], &found.decoded[r * n], h, n, at, end);
          EXPECT_LE(mine, 1.0001 * least + 1e-12) << text << " " << r << " " << at;
          before += losses[0];
          after += mine;
        }
      }
      EXPECT_NEAR(found.report.before, before, 1e-4 * before) << text;
      EXPECT_NEAR(found.report.after, after, 1e-4 * after) << text;
      EXPECT_LT(found.report.after, found.report.before) << text;
      EXPECT_GT(found.report.clipped, 0) << text;
      EXPECT_EQ(found.report.groups, rows * ((n + size - 1) / size)) << text;
    }
  }
}

TEST(AwqClip, DoubleQuantizedScales) {
  for (const char* text : {"nf4", "int4-g64-dq", "int2-g64-zp", "int3-g32-fz-dq"}) {
    const int64_t rows = 40, n = 300;
    const std::vector<float> w = random_weights(rows * n, 5, testing::Shape::kOutliers, 0.02f);
    const std::vector<float> h = random_hessian(n, 6);
    const Clipped found = clip(text, w, h, rows, best());
    ASSERT_TRUE(found.status.ok());
    Owned plain(format_of(text), rows, n);
    ASSERT_TRUE(plain.quantize(best(), Method::kSearch, w).ok());
    EXPECT_LT(testing::loss_of(w, found.decoded, h, rows),
              testing::loss_of(w, plain.decoded(), h, rows))
        << text;
  }
}

TEST(AwqClip, SameBitsOnEveryInstructionSetAndThreadCount) {
  for (const std::string& text : usable_formats()) {
    for (const auto& [rows, n] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {5, 17}, {135, 49}}) {
      const std::vector<float> w = random_weights(rows * n, 7, testing::Shape::kOutliers, 0.02f);
      const std::vector<float> h = random_hessian(n, 8);
      const Clipped base = clip(text, w, h, rows, portable::table);
      ASSERT_TRUE(base.status.ok());
      for (const InstructionSet& isa : instruction_sets()) {
        if (!isa.supported()) continue;
        const Clipped other =
            clip(text, w, h, rows, *isa.table, Method::kSearch, nullptr, testing::run_in_threads);
        EXPECT_EQ(other.bytes, base.bytes) << text << " " << isa.name;
        EXPECT_EQ(other.report.after, base.report.after) << text << " " << isa.name;
      }
    }
  }
}

TEST(AwqClip, WeightsStoredElsewhereCostNothing) {
  const int64_t rows = 20, n = 128;
  std::vector<float> w = random_weights(rows * n, 9, testing::Shape::kGaussian, 0.02f);
  std::vector<uint8_t> exact(w.size());
  for (size_t i = 0; i < w.size(); i += 61) exact[i] = 1;
  const std::vector<float> h = random_hessian(n, 10);
  const Clipped found = clip("int3-g64", w, h, rows, best(), Method::kSearch, exact.data());
  ASSERT_TRUE(found.status.ok());
  std::vector<float> decoded = found.decoded;
  for (size_t i = 0; i < w.size(); ++i) decoded[i] = exact[i] ? w[i] : decoded[i];
  double loss = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t at = 0; at < n; at += 64)
      loss += loss_of_span(&w[r * n], &decoded[r * n], h, n, at, at + 64);
  }
  EXPECT_NEAR(found.report.after, loss, 1e-4 * loss);
}

TEST(AwqClip, HardWeights) {
  const int64_t rows = 4, n = 70;
  const std::vector<float> h = random_hessian(n, 11), one = random_weights(rows * n, 12);
  for (const std::string& text : usable_formats()) {
    const std::vector<float> zeros(one.size(), 0.0f);
    const Clipped nothing = clip(text, zeros, h, rows, best());
    ASSERT_TRUE(nothing.status.ok());
    EXPECT_EQ(nothing.decoded, zeros) << text;
    EXPECT_EQ(nothing.report.clipped, 0) << text;
    for (float scale : {1e-38f, 1e-20f, 1e20f, 1e38f}) {
      std::vector<float> w = one;
      for (float& v : w) v *= scale;
      const Clipped found = clip(text, w, h, rows, best());
      ASSERT_TRUE(found.status.ok());
      for (float v : found.decoded) EXPECT_TRUE(std::isfinite(v)) << text << scale;
    }
  }
}

TEST(AwqClip, RefusesWhatItCannotClip) {
  const std::vector<float> w = random_weights(2 * 64, 13), h = random_hessian(64, 14);
  for (const char* text : {"int8-tensor", "nf3-tensor", "kmeans4-row"}) {
    EXPECT_NE(clip(text, w, h, 2, best()).status.message.find("no ranges of groups or rows"),
              std::string::npos);
  }
  EXPECT_NE(clip("nf4-outliers", w, h, 2, best()).status.message.find("has outliers"),
            std::string::npos);
  std::vector<float> bad = w;
  bad[70] = INFINITY;
  EXPECT_EQ(clip("int4-g64", bad, h, 2, best()).status.message,
            "weight[1, 6] is infinite; every weight must be finite");
  std::vector<float> broken = h;
  broken[65] = NAN;
  EXPECT_NE(clip("int4-g64", w, broken, 2, best()).status.message.find("hessian[1, 1] is NaN"),
            std::string::npos);
}

}  // namespace
}  // namespace bitfold
