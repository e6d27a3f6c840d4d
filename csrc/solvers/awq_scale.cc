#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/dequantize.h"
#include "solvers/awq.h"
#include "solvers/factor.h"
#include "solvers/quantize.h"
#include "solvers/row_reader.h"
#include "solvers/scratch_buffers.h"

namespace bitfold {
namespace {

constexpr int kSteps = 20;                     // of alpha, from 0 to 0.95
constexpr int64_t kWork = int64_t{1} << 31;    // multiplications per candidate
constexpr int64_t kLeastRows = 64;             // judged, where there are as many
constexpr int64_t kAtOnce = int64_t{1} << 22;  // errors that are multiplied at a time
constexpr int64_t kProductColumns = 512;       // products of as many run at full speed
constexpr int64_t kSumRows = 64;               // summed by one thread
constexpr float kLeastShare = 1e-4f;           // of the mean input, and of weights

struct Candidate {
  double alpha;
  bool by_weight;
  std::vector<float> scale;  // [channels]
};

Status error_in(size_t reader, const Status& status) {
  return Status::error(status.code, "reader " + std::to_string(reader) + ": " + status.message);
}

Status invalid(const std::string& message) {
  return Status::error(StatusCode::kInvalidArgument, message);
}

Status check(const AwqReader& reader, int64_t channels, const Parallel& parallel) {
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
  return HessianView{reader.hessian, false, n}.check_finite(parallel);
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

// Mean over all columns that carry a channel, weighted by tokens; 1 where there is none.
class ChannelMean {
 public:
  explicit ChannelMean(int64_t channels)
      : sum_(static_cast<size_t>(channels), 0.0), count_(sum_.size(), 0.0) {}

  template <class Values>
  void add(const AwqReader& reader, const Values& values) {
    const auto tokens = static_cast<double>(reader.tokens);
    for (int64_t c = 0; c < reader.weight.cols; ++c) {
      if (reader.channel[c] < 0) continue;
      const auto at = static_cast<size_t>(reader.channel[c]);
      sum_[at] += static_cast<double>(values[static_cast<size_t>(c)]) * tokens;
      count_[at] += tokens;
    }
  }
  std::vector<double> finish() const {
    std::vector<double> mean(sum_.size(), 1.0);
    for (size_t i = 0; i < mean.size(); ++i)
      if (count_[i] > 0.0) mean[i] = sum_[i] / count_[i];
    return mean;
  }

 private:
  std::vector<double> sum_, count_;
};

// A scale of 1 first, then the grid without those that are not positive and finite.
std::vector<Candidate> candidates(std::vector<double> inputs, std::vector<double> weights) {
  double mean = 0.0;
  for (double v : inputs) mean += v / static_cast<double>(inputs.size());
  for (double& v : inputs) v = std::max(v, kLeastShare * mean + 1e-30);
  for (double& v : weights) v = std::max(v, double{kLeastShare});
  std::vector<Candidate> all{{0.0, false, std::vector<float>(inputs.size(), 1.0f)}};
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
      Candidate candidate{alpha, by_weight, {}};
      for (double v : tried) candidate.scale.push_back(static_cast<float>(v / middle));
      if (std::all_of(candidate.scale.begin(), candidate.scale.end(),
                      [](float v) { return v > 0.0f && std::isfinite(v); }))
        all.push_back(std::move(candidate));
    }
  }
  return all;
}

// Sixteen sums, so that the compiler may take several at once.
double dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kSums = 16;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
  }
  double sum = 0.0;
  for (; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  for (float part : sums) sum += part;
  return sum;
}

// What rounding some rows of one reader leaves with one scale after another.
class Judge {
 public:
  Judge(const KernelTable& k, const LinearAlgebra& algebra, const AwqReader& reader,
        const Parallel& parallel)
      : k_(k),
        algebra_(algebra),
        reader_(reader),
        parallel_(parallel),
        n_(reader.weight.cols),
        rows_(std::min(reader.weight.rows, std::max(kLeastRows, kWork / (n_ * n_)))),
        size_(rows_ * n_),
        weight_(static_cast<size_t>(size_)),
        scaled_(weight_.size()),
        buffers_(reader.format, rows_, n_) {
    const int64_t steps = std::max<int64_t>(1, rows_ - 1);
    each_row(rows_, [&](int64_t i) {
      RowReader read(k_, reader_.weight);
      std::copy_n(read(i * (reader_.weight.rows - 1) / steps), n_, weight_.data() + i * n_);
    });
  }

  // losses[i] += tokens * the loss of all rows for candidate i, infinite where scaling overflows.
  Status run(const std::vector<Candidate>& all, std::vector<double>* losses) {
    const double share = static_cast<double>(reader_.weight.rows) / static_cast<double>(rows_) *
                         static_cast<double>(reader_.tokens);
    const auto most = static_cast<size_t>(std::max<int64_t>(1, kAtOnce / size_));
    for (size_t first = 0; first < all.size(); first += most) {
      const size_t count = std::min(most, all.size() - first);
      errors_.resize(count * static_cast<size_t>(size_));
      std::vector<bool> possible(count);
      for (size_t i = 0; i < count; ++i) {
        bool fits = false;
        const Status status =
            round(all[first + i], errors_.data() + static_cast<int64_t>(i) * size_, &fits);
        if (!status.ok()) return status;
        possible[i] = fits;
      }
      const std::vector<double> of_rows = products(static_cast<int64_t>(count) * rows_);
      for (size_t i = 0; i < count; ++i) {
        double loss = 0.0;
        for (int64_t r = 0; r < rows_; ++r)
          loss += of_rows[i * static_cast<size_t>(rows_) + static_cast<size_t>(r)];
        // NaN is of products beyond floats, which no candidate wins with.
        (*losses)[first + i] += possible[i] && !std::isnan(loss) ? share * loss : INFINITY;
      }
    }
    return Status::success();
  }

 private:
  template <class Body>
  void each_row(int64_t rows, const Body& body) const {
    parallel_(rows, grain(n_, kGrainWeights), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) body(r);
    });
  }

  // errors [rows, n] = decoded / scale - w.
  Status round(const Candidate& candidate, float* errors, bool* fits) {
    std::vector<float> by(static_cast<size_t>(n_), 1.0f);
    for (int64_t c = 0; c < n_; ++c)
      if (reader_.channel[c] >= 0)
        by[static_cast<size_t>(c)] = candidate.scale[static_cast<size_t>(reader_.channel[c])];
    each_row(rows_, [&](int64_t r) {
      for (int64_t c = 0; c < n_; ++c)
        scaled_[static_cast<size_t>(r * n_ + c)] =
            weight_[static_cast<size_t>(r * n_ + c)] * by[static_cast<size_t>(c)];
    });
    const Status status = quantize(k_, reader_.format, reader_.method,
                                   {scaled_.data(), FloatType::kFloat32, rows_, n_, n_, 1},
                                   buffers_.data(), parallel_);
    *fits = status.ok();
    if (status.code == StatusCode::kNonFinite) {  // the weights are finite, times the scale not
      std::fill_n(errors, size_, 0.0f);
      return Status::success();
    }
    if (!status.ok()) return status;
    dequantize(k_, buffers_.view(reader_.format, rows_, n_), FloatType::kFloat32, errors,
               parallel_);
    for (float& scale : by) scale = 1.0f / scale;
    each_row(rows_, [&](int64_t r) {
      for (int64_t c = 0; c < n_; ++c)
        errors[r * n_ + c] = errors[r * n_ + c] * by[static_cast<size_t>(c)] -
                             weight_[static_cast<size_t>(r * n_ + c)];
    });
    return Status::success();
  }

  // e H e of each row of errors. H is symmetric, so a panel of its columns is multiplied by what
  // comes before its own rows alone, which counts twice: little more than half of the product.
  std::vector<double> products(int64_t rows) {
    std::vector<double> sums(static_cast<size_t>(rows), 0.0);
    products_.resize(static_cast<size_t>(rows * std::min(n_, kProductColumns)));
    for (int64_t first = 0; first < n_; first += kProductColumns) {
      const int64_t width = std::min(kProductColumns, n_ - first);
      const float *h = reader_.hessian, *e = errors_.data();
      algebra_.gemm(false, false, rows, width, width, 1.0f, e + first, n_, h + first * n_ + first,
                    n_, 0.0f, products_.data(), width);
      if (first > 0) {
        algebra_.gemm(false, false, rows, width, first, 2.0f, e, n_, h + first, n_, 1.0f,
                      products_.data(), width);
      }
      each_row(rows, [&](int64_t r) {
        sums[static_cast<size_t>(r)] +=
            dot(e + r * n_ + first, products_.data() + r * width, width);
      });
    }
    return sums;
  }

  const KernelTable& k_;
  const LinearAlgebra& algebra_;
  const AwqReader& reader_;
  const Parallel& parallel_;
  const int64_t n_, rows_, size_;
  std::vector<float> weight_, scaled_, errors_, products_;
  const ScratchBuffers buffers_;
};

}  // namespace

Status awq_scale(const KernelTable& k, const LinearAlgebra& algebra,
                 const std::vector<AwqReader>& readers, int64_t channels, const Parallel& parallel,
                 float* scale, AwqScale* found) {
  if (readers.empty()) return invalid("there must be at least one reader of the scaled channels");
  if (channels < 1) {
    return invalid("channels must be at least 1, got " + std::to_string(channels));
  }
  ChannelMean inputs(channels), weights(channels);
  for (size_t i = 0; i < readers.size(); ++i) {
    std::vector<double> shares;
    Status status = check(readers[i], channels, parallel);
    if (status.ok()) status = relative_magnitudes(k, readers[i], parallel, &shares);
    if (!status.ok()) return error_in(i, status);
    inputs.add(readers[i], readers[i].magnitude);
    weights.add(readers[i], shares);
  }
  const std::vector<Candidate> all = candidates(inputs.finish(), weights.finish());
  std::vector<double> losses(all.size(), 0.0);
  for (size_t i = 0; i < readers.size(); ++i) {
    const Status status = Judge(k, algebra, readers[i], parallel).run(all, &losses);
    if (!status.ok()) return error_in(i, status);
  }
  const auto best =
      static_cast<size_t>(std::min_element(losses.begin(), losses.end()) - losses.begin());
  std::copy(all[best].scale.begin(), all[best].scale.end(), scale);
  *found = {best > 0, all[best].alpha, all[best].by_weight, losses[0], losses[best]};
  return Status::success();
}

}  // namespace bitfold
