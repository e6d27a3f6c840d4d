#include "solvers/outliers.h"

#include <numeric>

#include "support.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::Owned;
using testing::random_weights;
using testing::Shape;

MatrixView matrix(const std::vector<float>& w, int64_t rows, int64_t cols) {
  return {w.data(), FloatType::kFloat32, rows, cols, cols, 1};
}

std::vector<uint8_t> choose(const std::string& text, const std::vector<float>& w, int64_t rows,
                            int64_t cols, const float* importance = nullptr,
                            const Parallel& parallel = run_serially) {
  std::vector<uint8_t> mask(w.size());
  const Format format = format_of(text);
  EXPECT_TRUE(choose_outliers(active_kernels(), format, format.element().method,
                              matrix(w, rows, cols), importance, mask.data(), parallel)
                  .ok());
  EXPECT_EQ(std::accumulate(mask.begin(), mask.end(), int64_t{0}),
            format.outlier_count(rows, cols));
  return mask;
}

TEST(ChooseOutliers, FindsWhatIsFarOut) {
  for (const char* text : {"int3-g64-outliers", "nf4-outliers", "int8-outliers",
                           "int4-g16-fz-outliers", "int4-tensor-outliers", "kmeans3-outliers"}) {
    std::vector<float> w = random_weights(20 * 200, 1);
    std::set<size_t> planted;
    std::mt19937 rng(2);
    while (planted.size() < 40) planted.insert(rng() % w.size());
    for (size_t at : planted) w[at] = std::copysign(30.0f + std::fabs(w[at]), w[at]);
    const std::vector<uint8_t> mask = choose(text, w, 20, 200);
    for (size_t at : planted) EXPECT_EQ(mask[at], 1) << text << " " << at;
  }
}

TEST(ChooseOutliers, ImportantColumnsComeFirst) {
  const std::vector<float> w = random_weights(10 * 100, 1);
  std::vector<float> importance(100, 1.0f);
  importance[17] = 1e6f;
  const auto mask = choose("int4-g16-outliers", w, 10, 100, importance.data());
  for (size_t i = 0; i < mask.size(); ++i) EXPECT_EQ(mask[i] && i % 100 != 17, false) << i;
}

TEST(ChooseOutliers, OfEqualOnesTheFirst) {
  const std::vector<float> w(3 * 500, 0.0f);
  const auto mask = choose("int4-g16-outliers", w, 3, 500);
  for (size_t i = 0; i < mask.size(); ++i) EXPECT_EQ(mask[i], i < 15);
}

TEST(ChooseOutliers, ThreadsChangeNothing) {
  const std::vector<float> w = random_weights(37 * 300, 4, Shape::kOutliers);
  EXPECT_EQ(choose("int3-outliers", w, 37, 300),
            choose("int3-outliers", w, 37, 300, nullptr, testing::run_in_threads));
}

TEST(SetAside, OutliersEndWhereTheOthersDo) {
  const std::vector<float> w = {9, 1, -2, 0.5f, -7, 1.5f, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,  // 16
                                5, 6};
  std::vector<uint8_t> mask(18);
  mask[0] = mask[4] = mask[5] = mask[16] = mask[17] = 1;
  std::vector<float> out(18);
  set_aside(active_kernels(), format_of("int4-g16-outliers"), matrix(w, 1, 18), mask.data(),
            out.data(), run_serially);
  std::vector<float> expected = w;
  expected[4] = -2.0f;  // 9 and 1.5 are within the others; 5 and 6 have no others
  EXPECT_EQ(out, expected);
}

TEST(QuantizeWithOutliers, LosesLessThanTheDenseFormat) {
  for (const char* dense : {"int3-g64", "nf4", "int8-row", "int2-g64", "kmeans3-row", "int4-tensor",
                            "int4-g64-dq", "int3-g64-fz"}) {
    const std::vector<float> w = random_weights(64 * 512, 5, Shape::kOutliers);
    double errors[2];
    for (int with : {0, 1}) {
      const Format format = format_of(std::string(dense) + (with ? "-outliers20" : ""));
      Owned packed(format, 64, 512);
      ASSERT_TRUE(packed.quantize(active_kernels(), format.element().method, w).ok());
      errors[with] = testing::squared_error(packed.decoded(), w);
    }
    EXPECT_LT(errors[1], 0.6 * errors[0]) << dense;
  }
}

TEST(QuantizeWithOutliers, TinyAndHugeWeightsKeepTheirDigits) {
  for (float scale : {1e-30f, 1e-7f, 1.0f, 1e6f, 1e30f}) {
    const std::vector<float> w = random_weights(16 * 256, 6, Shape::kOutliers, scale);
    Owned packed(format_of("int4-g64-outliers50"), 16, 256);
    ASSERT_TRUE(packed.quantize(active_kernels(), Method::kSearch, w).ok());
    const std::vector<float> got = packed.decoded();
    const PackedView view = packed.view();
    for (int64_t r = 0; r < 16; ++r) {
      const auto [begin, end] = outliers_of(view.outliers, r);
      for (int64_t i = begin; i < end; ++i) {
        const auto at = static_cast<size_t>(r * 256 + outlier_column(view, i));
        EXPECT_NEAR(got[at], w[at], std::fabs(w[at]) * 0x1p-10 + 0x1p-20 * scale) << scale;
      }
    }
  }
}

TEST(QuantizeWithOutliers, StoresRowsInOrder) {
  for (int64_t cols : {1, 300, 70000}) {
    const std::vector<float> w = random_weights(7 * cols, 7);
    Owned packed(format_of("int2-g64-outliers100"), 7, cols);
    ASSERT_TRUE(packed.quantize(active_kernels(), Method::kRound, w).ok());
    const PackedView view = packed.view();
    EXPECT_EQ(view.outliers.row[0], 0);
    EXPECT_EQ(view.outliers.row[7], view.outliers.count);
    for (int64_t r = 0; r < 7; ++r) {
      EXPECT_LE(view.outliers.row[r], view.outliers.row[r + 1]);
      for (int64_t i = view.outliers.row[r] + 1; i < view.outliers.row[r + 1]; ++i)
        EXPECT_LT(outlier_column(view, i - 1), outlier_column(view, i));
    }
  }
}

TEST(QuantizeWithOutliers, NamesWhatIsNotFinite) {
  std::vector<float> w = random_weights(5 * 70, 8);
  w[3 * 70 + 69] = INFINITY;
  Owned packed(format_of("int4-g64-outliers"), 5, 70);
  const Status status = packed.quantize(active_kernels(), Method::kSearch, w);
  EXPECT_EQ(status.code, StatusCode::kNonFinite);
  EXPECT_NE(status.message.find("weight[3, 69] is infinite"), std::string::npos) << status.message;
}

TEST(FillOutliers, WantsExactlyAsManyAsTheFormatHas) {
  const std::vector<float> w = random_weights(5 * 70, 9);
  Owned packed(format_of("int4-g64-outliers"), 5, 70);
  std::vector<uint8_t> mask(w.size());
  std::vector<void*> buffers;
  for (size_t i = 0; i < packed.bytes().size(); ++i) buffers.push_back(packed.pointer(i));
  for (size_t marked : {0, 3, 5}) {
    std::fill(mask.begin(), mask.end(), 0);
    std::fill_n(mask.begin() + 100, marked, 1);
    const Status status = fill_outliers(active_kernels(), packed.format(), matrix(w, 5, 70),
                                        mask.data(), buffers.data(), run_serially);
    EXPECT_NE(status.message.find("must mark 4 of 350"), std::string::npos) << status.message;
  }
}

}  // namespace
}  // namespace bitfold
