// One-dimensional k-means by Lloyd's algorithm over sorted weighted points.
#pragma once

#include <cstdint>
#include <vector>

namespace bitfold {

struct WeightedPoints {  // ascending values
  std::vector<double> value;
  std::vector<double> weight;
};

// The distinct values of w[n], ascending, with their multiplicity.
WeightedPoints points_of(const float* w, int64_t n);
// The same with the summed importance[n] for multiplicity; what has none is left out.
WeightedPoints points_of(const float* w, const float* importance, int64_t n);

// Collects a stream of weights of any length in 65536 bins by the leading 16 bits of each float
// (relative width 2^-7), each represented by the mean of what fell in it.
class PointHistogram {
 public:
  PointHistogram();
  void add(const float* w, int64_t n);
  void add(const float* w, const float* importance, int64_t n);
  WeightedPoints points() const;

 private:
  std::vector<double> count_, sum_;
};

// k ascending levels that (locally) minimize the weighted squared distance; exact where there are
// at most k distinct values.
std::vector<float> kmeans(const WeightedPoints& points, int k);

}  // namespace bitfold
