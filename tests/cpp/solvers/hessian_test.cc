#include "solvers/hessian.h"

#include "solvers/calibration.h"

namespace bitfold {
namespace {

using testing::naive_algebra;
using testing::random_weights;
using testing::run_in_threads;

const KernelTable& best() {
  Status status;
  return *active_instruction_set(&status)->table;
}

MatrixView rows_of(const std::vector<float>& x, int64_t begin, int64_t end, int64_t n) {
  return {x.data() + begin * n, FloatType::kFloat32, end - begin, n, n, 1};
}

template <class T>
std::vector<T> expected(const std::vector<float>& x, const std::vector<float>& y, int64_t n,
                        const std::vector<int64_t>& rows) {
  std::vector<T> mean(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.0;
      for (int64_t r : rows)
        sum += static_cast<double>(x[static_cast<size_t>(r * n + i)]) *
               y[static_cast<size_t>(r * n + j)];
      mean[static_cast<size_t>(i * n + j)] = static_cast<T>(sum / static_cast<double>(rows.size()));
    }
  }
  return mean;
}

template <class T>
void expect_near(const std::vector<T>& a, const std::vector<T>& b, double tolerance) {
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], tolerance) << i;
}

// Widths below, at and across the blocks; the mean starts as NaN, which must not be read.
TEST(Hessian, AnySplitGivesTheMeanOfAllRows) {
  for (int64_t n : {1, 5, 64, 131, 600}) {
    const int64_t tokens = 37;
    const std::vector<float> x = random_weights(tokens * n, 5);
    std::vector<int64_t> all;
    for (int64_t r = 0; r < tokens; ++r) all.push_back(r);
    const std::vector<float> want = expected<float>(x, x, n, all);
    for (const std::vector<int64_t>& cuts :
         {std::vector<int64_t>{37}, std::vector<int64_t>{1, 30, 37},
          std::vector<int64_t>{20, 37}}) {
      std::vector<float> hessian(static_cast<size_t>(n * n), NAN);
      int64_t at = 0;
      for (int64_t cut : cuts) {
        Counts counts;
        ASSERT_TRUE(update_hessian({best(), naive_algebra(), run_in_threads},
                                   rows_of(x, at, cut, n), nullptr, at, hessian.data(), &counts)
                        .ok());
        EXPECT_EQ(counts.counted, cut - at);
        EXPECT_EQ(counts.dropped, 0);
        at = cut;
      }
      ASSERT_TRUE(
          finish_hessian({best(), naive_algebra(), run_in_threads}, n, hessian.data()).ok());
      expect_near(hessian, want, 1e-5);
    }
  }
}

TEST(Hessian, MaskedAndBrokenRowsAreLeftOut) {
  const int64_t n = 70, tokens = 20;
  std::vector<float> x = random_weights(tokens * n, 6);
  std::vector<uint8_t> mask(static_cast<size_t>(tokens), 1);
  mask[3] = mask[4] = 0;
  x[static_cast<size_t>(4 * n + 1)] = NAN;  // masked: nobody's business
  x[static_cast<size_t>(9 * n + 69)] = INFINITY;
  std::vector<int64_t> counted;
  for (int64_t r = 0; r < tokens; ++r) {
    if (r != 3 && r != 4 && r != 9) counted.push_back(r);
  }
  std::vector<double> hessian(static_cast<size_t>(n * n), NAN);
  Counts counts;
  ASSERT_TRUE(update_hessian({best(), naive_algebra(), run_serially}, rows_of(x, 0, tokens, n),
                             mask.data(), 0, hessian.data(), &counts)
                  .ok());
  EXPECT_EQ(counts.counted, 17);
  EXPECT_EQ(counts.dropped, 1);
  ASSERT_TRUE(finish_hessian({best(), naive_algebra(), run_serially}, n, hessian.data()).ok());
  expect_near(hessian, expected<double>(x, x, n, counted), 1e-12);

  std::vector<float> y = random_weights(tokens * n, 7), difference(y.size());
  y[static_cast<size_t>(11 * n)] = NAN;
  counted.erase(std::find(counted.begin(), counted.end(), 11));
  for (size_t i = 0; i < y.size(); ++i) difference[i] = y[i] - x[i];
  std::vector<float> cross(static_cast<size_t>(n * n), NAN);
  Counts both;
  ASSERT_TRUE(update_cross({best(), naive_algebra(), run_in_threads}, rows_of(y, 0, tokens, n),
                           rows_of(x, 0, tokens, n), mask.data(), 0, cross.data(), &both)
                  .ok());
  EXPECT_EQ(both.counted, 16);
  EXPECT_EQ(both.dropped, 2);
  expect_near(cross, expected<float>(difference, x, n, counted), 1e-5);
}

TEST(Hessian, NothingToCountChangesNothing) {
  std::vector<float> hessian(16, 3.0f), x(8, NAN);
  Counts counts;
  ASSERT_TRUE(update_hessian({best(), naive_algebra(), run_serially}, rows_of(x, 0, 2, 4), nullptr,
                             5, hessian.data(), &counts)
                  .ok());
  EXPECT_EQ(counts.counted, 0);
  EXPECT_EQ(counts.dropped, 2);
  EXPECT_EQ(hessian, std::vector<float>(16, 3.0f));
}

}  // namespace
}  // namespace bitfold
