#include "solvers/kmeans.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "core/float16.h"

namespace bitfold {
namespace {

constexpr int kMaxSweeps = 1000;

struct Prefix {  // sums of weight, weight * value, weight * value^2 over points [0, i)
  std::vector<double> w, wx, wxx;
  explicit Prefix(const WeightedPoints& p) : w(p.value.size() + 1), wx(w.size()), wxx(w.size()) {
    for (size_t i = 0; i < p.value.size(); ++i) {
      w[i + 1] = w[i] + p.weight[i];
      wx[i + 1] = wx[i] + p.weight[i] * p.value[i];
      wxx[i + 1] = wxx[i] + p.weight[i] * p.value[i] * p.value[i];
    }
  }
};

// Moves levels to the means of their cells until nothing changes; returns the squared distance.
double lloyd(const WeightedPoints& points, const Prefix& prefix, std::vector<double>* levels) {
  double before = std::numeric_limits<double>::infinity();
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    double distance = 0.0;
    size_t begin = 0;
    for (size_t j = 0; j < levels->size(); ++j) {
      const double level = (*levels)[j];
      size_t end = points.value.size();
      if (j + 1 < levels->size()) {
        const double middle = (level + (*levels)[j + 1]) / 2;
        end =
            static_cast<size_t>(std::upper_bound(points.value.begin() + static_cast<int64_t>(begin),
                                                 points.value.end(), middle) -
                                points.value.begin());
      }
      const double w = prefix.w[end] - prefix.w[begin];
      const double wx = prefix.wx[end] - prefix.wx[begin];
      const double wxx = prefix.wxx[end] - prefix.wxx[begin];
      if (w > 0.0) {
        (*levels)[j] = wx / w;
        distance += std::max(0.0, wxx - wx * wx / w);
      }
      begin = end;
    }
    if (!(distance < before * (1.0 - 1e-9))) return distance;
    before = distance;
  }
  return before;
}

// Ascends with the value: negative floats descend with their bits, so those are flipped.
uint32_t ascending_key(float v) {
  const uint32_t bits = bits_from_float(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float value_of_key(uint32_t key) {
  return float_from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Three passes over 11 bits each; many times faster than std::sort on a row.
std::vector<float> sorted_copy(const float* w, int64_t n) {
  // Zeros of both signs are equal, and which comes first shows in the levels of a row of few
  // values: std::sort's order stays what it was.
  if (std::any_of(w, w + n, [](float v) { return v == 0.0f && std::signbit(v); })) {
    std::vector<float> sorted(w, w + n);
    std::sort(sorted.begin(), sorted.end());
    return sorted;
  }
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  std::vector<uint32_t> from(static_cast<size_t>(n)), to(from.size());
  std::transform(w, w + n, from.begin(), ascending_key);
  for (int shift = 0; shift < 32; shift += kBits) {
    std::array<uint32_t, kBuckets + 1> start{};
    for (uint32_t key : from) ++start[(key >> shift & (kBuckets - 1)) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (uint32_t key : from) to[start[key >> shift & (kBuckets - 1)]++] = key;
    from.swap(to);
  }
  std::vector<float> sorted(from.size());
  std::transform(from.begin(), from.end(), sorted.begin(), value_of_key);
  return sorted;
}

}  // namespace

WeightedPoints points_of(const float* w, int64_t n) {
  const std::vector<float> sorted = sorted_copy(w, n);
  WeightedPoints points;
  points.value.reserve(sorted.size());
  points.weight.reserve(sorted.size());
  for (float v : sorted) {
    if (!points.value.empty() && points.value.back() == v) {
      points.weight.back() += 1.0;
    } else {
      points.value.push_back(v);
      points.weight.push_back(1.0);
    }
  }
  return points;
}

WeightedPoints points_of(const float* w, const float* importance, int64_t n) {
  std::vector<std::pair<float, float>> pairs;
  for (int64_t i = 0; i < n; ++i) {
    if (importance[i] > 0.0f) pairs.emplace_back(w[i] == 0.0f ? 0.0f : w[i], importance[i]);
  }
  std::sort(pairs.begin(), pairs.end());
  WeightedPoints points;
  for (const auto& [value, weight] : pairs) {
    if (!points.value.empty() && points.value.back() == value) {
      points.weight.back() += weight;
    } else {
      points.value.push_back(value);
      points.weight.push_back(weight);
    }
  }
  return points;
}

PointHistogram::PointHistogram() : count_(1 << 16), sum_(1 << 16) {}

void PointHistogram::add(const float* w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bin = ascending_key(w[i]) >> 16;
    count_[bin] += 1.0;
    sum_[bin] += w[i];
  }
}

void PointHistogram::add(const float* w, const float* importance, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bin = ascending_key(w[i]) >> 16;
    count_[bin] += importance[i];
    sum_[bin] += static_cast<double>(importance[i]) * w[i];
  }
}

WeightedPoints PointHistogram::points() const {
  WeightedPoints points;
  for (size_t bin = 0; bin < count_.size(); ++bin) {
    if (count_[bin] == 0.0) continue;
    points.value.push_back(sum_[bin] / count_[bin]);
    points.weight.push_back(count_[bin]);
  }
  return points;
}

std::vector<float> kmeans(const WeightedPoints& points, int k) {
  const size_t count = points.value.size();
  std::vector<float> result(static_cast<size_t>(k),
                            count ? static_cast<float>(points.value.back()) : 0.0f);
  if (count <= result.size()) {
    std::transform(points.value.begin(), points.value.end(), result.begin(),
                   [](double v) { return static_cast<float>(v); });
    return result;
  }
  const Prefix prefix(points);
  // Two starts, the better end wins. Optimal levels of a density p lie as p^(1/3) (Panter and Dite
  // 1951), which for a normal density is again normal, 3 times the variance: close to the optimum
  // for bell shapes. Equal width suits flat ones and outliers.
  const double total = prefix.w.back();
  const double mean = prefix.wx.back() / total;
  const double spread = std::sqrt(std::max(0.0, prefix.wxx.back() / total - mean * mean));
  const double low = points.value.front(), high = points.value.back();
  std::vector<double> bell(static_cast<size_t>(k)), flat(bell.size());
  for (size_t j = 0; j < bell.size(); ++j) {
    const double share = (static_cast<double>(j) + 0.5) / k;
    // The logistic quantile, scaled to the same variance, stands in for the normal one: this is
    // only a start.
    const double quantile = std::log(share / (1.0 - share)) * std::sqrt(3.0) / M_PI;
    bell[j] = std::clamp(mean + std::sqrt(3.0) * spread * quantile, low, high);
    flat[j] = low + share * (high - low);
  }
  std::vector<double>& best =
      lloyd(points, prefix, &bell) <= lloyd(points, prefix, &flat) ? bell : flat;
  std::sort(best.begin(), best.end());
  std::transform(best.begin(), best.end(), result.begin(),
                 [](double v) { return static_cast<float>(v); });
  return result;
}

}  // namespace bitfold
