#include "solvers/awq_grid.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "solvers/factor.h"
#include "solvers/row_reader.h"

namespace bitfold {
namespace {

constexpr int kSteps = 20;            // of alpha, from 0 to 0.95
constexpr int64_t kSumRows = 64;      // summed by one thread
constexpr float kLeastShare = 1e-4f;  // of the mean input, and of weights

Status invalid(const std::string& message) {
  return Status::error(StatusCode::kInvalidArgument, message);
}

// shares [cols]: mean over rows of |w| / max |w| of its group. Fails on NaN and infinity.
Status relative_magnitudes(const KernelTable& k, const AwqReader& reader, const Parallel& parallel,
                           std::vector<double>* shares) {
  const MatrixView& w = reader.weight;
  const int64_t group =
      reader.format.grouping == Grouping::kGroup ? reader.format.group_size : w.cols;
  const int64_t groups = (w.cols + group - 1) / group, blocks = (w.rows + kSumRows - 1) / kSumRows;
  std::vector<float> sums(static_cast<size_t>(blocks * w.cols), 0.0f);
  std::vector<int64_t> bad(static_cast<size_t>(blocks), w.rows);
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    RowReader read(k, w);
    std::vector<float> low(static_cast<size_t>(groups)), high(low.size());
    for (int64_t b = begin; b < end; ++b) {
      float* const sum = sums.data() + b * w.cols;
      for (int64_t r = b * kSumRows; r < std::min(w.rows, (b + 1) * kSumRows); ++r) {
        const float* row = read(r);
        if (!k.stats(row, w.cols, group, low.data(), high.data())) {
          bad[static_cast<size_t>(b)] = r;
          break;
        }
        for (int64_t g = 0; g < groups; ++g) {
          const float largest = std::max(std::fabs(low[static_cast<size_t>(g)]),
                                         std::fabs(high[static_cast<size_t>(g)]));
          const float inverse = 1.0f / std::max(largest, 1e-30f);
          for (int64_t c = g * group; c < std::min(w.cols, (g + 1) * group); ++c)
            sum[c] += std::fabs(row[c]) * inverse;
        }
      }
    }
  });
  const int64_t first_bad = *std::min_element(bad.begin(), bad.end());
  if (first_bad < w.rows) return non_finite_row(k, w, first_bad);
  shares->assign(static_cast<size_t>(w.cols), 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t c = 0; c < w.cols; ++c)
      (*shares)[static_cast<size_t>(c)] += sums[static_cast<size_t>(b * w.cols + c)];
  }
  for (double& share : *shares) share /= static_cast<double>(w.rows);
  return Status::success();
}

// A scale of 1 first, then the grid without those that are not positive and finite.
std::vector<ScaleCandidate> candidates(std::vector<double> inputs, std::vector<double> weights) {
  double mean = 0.0;
  for (double v : inputs) mean += v / static_cast<double>(inputs.size());
  for (double& v : inputs) v = std::max(v, kLeastShare * mean + 1e-30);
  for (double& v : weights) v = std::max(v, double{kLeastShare});
  std::vector<ScaleCandidate> all{{0.0, false, std::vector<float>(inputs.size(), 1.0f)}};
  for (bool by_weight : {false, true}) {
    for (int i = by_weight ? 0 : 1; i < kSteps; ++i) {
      const double alpha = static_cast<double>(i) / kSteps;
      std::vector<double> tried(inputs.size());
      for (size_t c = 0; c < tried.size(); ++c) {
        tried[c] = std::pow(inputs[c], alpha);
        if (by_weight) tried[c] /= std::pow(weights[c], 1.0 - alpha);
      }
      const auto [least, most] = std::minmax_element(tried.begin(), tried.end());
      const double middle = std::sqrt(*least * *most);
      ScaleCandidate candidate{alpha, by_weight, {}};
      for (double v : tried) candidate.scale.push_back(static_cast<float>(v / middle));
      if (std::all_of(candidate.scale.begin(), candidate.scale.end(),
                      [](float v) { return v > 0.0f && std::isfinite(v); }))
        all.push_back(std::move(candidate));
    }
  }
  return all;
}

}  // namespace

Status in_reader(size_t reader, const Status& status) {
  return Status::error(status.code, "reader " + std::to_string(reader) + ": " + status.message);
}

Status check_grid(size_t readers, int64_t channels) {
  if (readers == 0) return invalid("there must be at least one reader of the scaled channels");
  if (channels >= 1) return Status::success();
  return invalid("channels must be at least 1, got " + std::to_string(channels));
}

Status check_reader(const AwqReader& reader, int64_t channels) {
  const int64_t n = reader.weight.cols;
  if (reader.weight.rows <= 0 || n <= 0) {
    return invalid("weight must have at least one row and one column, got [" +
                   std::to_string(reader.weight.rows) + ", " + std::to_string(n) + "]");
  }
  if (reader.tokens < 0) {
    return invalid("tokens must be the number of inputs that the Hessian is the mean of, got " +
                   std::to_string(reader.tokens));
  }
  for (int64_t c = 0; c < n; ++c) {
    if (reader.channel[c] < -1 || reader.channel[c] >= channels) {
      return invalid("channel[" + std::to_string(c) + "] must be -1 or below " +
                     std::to_string(channels) + ", the number of channels, got " +
                     std::to_string(reader.channel[c]));
    }
    if (!(reader.magnitude[c] >= 0.0f && std::isfinite(reader.magnitude[c]))) {
      return invalid("mean_abs[" + std::to_string(c) + "] must be finite and not negative, got " +
                     std::to_string(reader.magnitude[c]));
    }
  }
  return Status::success();
}

ScaleGrid::ScaleGrid(int64_t channels)
    : inputs_(static_cast<size_t>(channels)), weights_(inputs_.size()) {}

void ScaleGrid::add(const AwqReader& reader, const std::vector<double>& shares) {
  for (int64_t c = 0; c < reader.weight.cols; ++c) {
    if (reader.channel[c] < 0) continue;
    const auto at = static_cast<size_t>(reader.channel[c]);
    inputs_[at].add(reader.magnitude[c], reader.tokens);
    weights_[at].add(shares[static_cast<size_t>(c)], reader.tokens);
  }
}

std::vector<ScaleCandidate> ScaleGrid::finish() const {
  const auto means_of = [](const std::vector<Mean>& all) {
    std::vector<double> means;
    for (const Mean& mean : all) means.push_back(mean.get());
    return means;
  };
  return candidates(means_of(inputs_), means_of(weights_));
}

int64_t judged_rows(const MatrixView& weight) {
  constexpr int64_t kWork = int64_t{1} << 31;  // multiplications per candidate
  constexpr int64_t kLeastRows = 64;           // where there are as many
  return std::min(weight.rows, std::max(kLeastRows, kWork / (weight.cols * weight.cols)));
}

const ScaleCandidate& best_of(const std::vector<ScaleCandidate>& all,
                              const std::vector<double>& losses, AwqScale* found) {
  const auto best =
      static_cast<size_t>(std::min_element(losses.begin(), losses.end()) - losses.begin());
  *found = {best > 0, all[best].alpha, all[best].by_weight, losses[0], losses[best]};
  return all[best];
}

Status scale_candidates(const KernelTable& k, const std::vector<AwqReader>& readers,
                        int64_t channels, const Parallel& parallel,
                        std::vector<ScaleCandidate>* all) {
  if (Status status = check_grid(readers.size(), channels); !status.ok()) return status;
  ScaleGrid grid(channels);
  for (size_t i = 0; i < readers.size(); ++i) {
    const AwqReader& reader = readers[i];
    std::vector<double> shares;
    Status status = check_reader(reader, channels);
    if (status.ok())
      status = HessianView{reader.hessian, false, reader.weight.cols}.check_finite(parallel);
    if (status.ok()) status = relative_magnitudes(k, reader, parallel, &shares);
    if (!status.ok()) return in_reader(i, status);
    grid.add(reader, shares);
  }
  *all = grid.finish();
  return Status::success();
}

}  // namespace bitfold
