#include "solvers/kmeans.h"

#include "support.h"

namespace bitfold {
namespace {

double distance(const WeightedPoints& points, const std::vector<float>& levels) {
  double sum = 0.0;
  for (size_t i = 0; i < points.value.size(); ++i) {
    double best = INFINITY;
    for (float level : levels) best = std::min(best, std::pow(points.value[i] - level, 2));
    sum += points.weight[i] * best;
  }
  return sum;
}

TEST(Points, DistinctValuesWithMultiplicity) {
  const float w[] = {2.0f, -1.0f, 2.0f, 0.5f, 2.0f};
  const WeightedPoints points = points_of(w, 5);
  EXPECT_EQ(points.value, (std::vector<double>{-1.0, 0.5, 2.0}));
  EXPECT_EQ(points.weight, (std::vector<double>{1.0, 1.0, 3.0}));
}

TEST(Kmeans, FewDistinctValuesAreExact) {
  for (int k : {4, 8, 16}) {
    for (int distinct = 1; distinct <= k; ++distinct) {
      std::vector<float> w;
      for (int i = 0; i < 100; ++i) w.push_back(static_cast<float>(i % distinct) * 0.37f - 1.0f);
      const std::vector<float> levels = kmeans(points_of(w.data(), 100), k);
      ASSERT_EQ(levels.size(), static_cast<size_t>(k));
      EXPECT_TRUE(std::is_sorted(levels.begin(), levels.end()));
      EXPECT_EQ(distance(points_of(w.data(), 100), levels), 0.0);
    }
  }
}

TEST(Kmeans, GaussianReachesLloydMax) {
  // Distortion of the best 4, 8 and 16 levels for a unit Gaussian: 0.1175, 0.0345, 0.0095.
  const auto w = testing::random_weights(1 << 17, 1);
  const WeightedPoints points = points_of(w.data(), 1 << 17);
  const std::pair<int, double> best[] = {{4, 0.1175}, {8, 0.03454}, {16, 0.009497}};
  for (const auto& [k, expected] : best)
    EXPECT_NEAR(distance(points, kmeans(points, k)) / (1 << 17), expected, expected * 0.03);
}

TEST(Kmeans, NeverWorseThanEqualWidths) {
  for (auto shape : {testing::Shape::kGaussian, testing::Shape::kUniform, testing::Shape::kLaplace,
                     testing::Shape::kOutliers}) {
    for (int n : {17, 100, 5000}) {
      const auto w = testing::random_weights(n, 2, shape);
      const WeightedPoints points = points_of(w.data(), n);
      for (int k : {4, 8, 16}) {
        std::vector<float> flat;
        const double low = points.value.front(), step = (points.value.back() - low) / k;
        for (int j = 0; j < k; ++j) flat.push_back(static_cast<float>(low + (j + 0.5) * step));
        const std::vector<float> levels = kmeans(points, k);
        EXPECT_TRUE(std::is_sorted(levels.begin(), levels.end()));
        EXPECT_LE(distance(points, levels), distance(points, flat) * (1 + 1e-6));
      }
    }
  }
}

TEST(Histogram, StaysCloseToTheExactPoints) {
  const auto w = testing::random_weights(1 << 16, 3, testing::Shape::kGaussian, 0.02f);
  PointHistogram histogram;
  for (int64_t at = 0; at < 1 << 16; at += 1000)
    histogram.add(w.data() + at, std::min<int64_t>(1000, (1 << 16) - at));
  const WeightedPoints binned = histogram.points(), exact = points_of(w.data(), 1 << 16);
  EXPECT_TRUE(std::is_sorted(binned.value.begin(), binned.value.end()));
  double total = 0.0;
  for (double weight : binned.weight) total += weight;
  EXPECT_EQ(total, 65536.0);
  for (int k : {4, 16})
    EXPECT_LE(distance(exact, kmeans(binned, k)), distance(exact, kmeans(exact, k)) * 1.01);
}

TEST(Histogram, FewDistinctValuesAreExactAlsoWhenClose) {
  PointHistogram histogram;
  const float w[] = {0.0f, -0.0f, 1.0f, -1.0f};
  histogram.add(w, 4);
  const std::vector<float> levels = kmeans(histogram.points(), 4);
  for (float v : w) EXPECT_NE(std::find(levels.begin(), levels.end(), v), levels.end()) << v;
}

TEST(Kmeans, ImportanceCountsLikeCopies) {
  const std::vector<float> w = {0.5f, -1.0f, 0.25f, 0.0f, 2.0f, 0.0f, 9.0f};
  const std::vector<float> importance = {2.0f, 1.0f, 3.0f, 1.0f, 1.0f, 1.0f, 0.0f};
  const std::vector<float> copies = {0.5f, 0.5f, -1.0f, 0.25f, 0.25f, 0.25f, 0.0f, 0.0f, 2.0f};
  const auto n = static_cast<int64_t>(w.size()), many = static_cast<int64_t>(copies.size());
  const WeightedPoints a = points_of(w.data(), importance.data(), n);
  const WeightedPoints b = points_of(copies.data(), many);
  EXPECT_EQ(a.value, b.value);
  EXPECT_EQ(a.weight, b.weight);
  PointHistogram weighted, plain;
  weighted.add(w.data(), importance.data(), n);
  plain.add(copies.data(), many);
  EXPECT_EQ(kmeans(weighted.points(), 3), kmeans(plain.points(), 3));
}

}  // namespace
}  // namespace bitfold
