#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dequantize.h"
#include "solvers/awq_grid.h"
#include "solvers/quantize.h"
#include "solvers/row_reader.h"
#include "solvers/scratch_buffers.h"

namespace bitfold {
namespace {

constexpr int64_t kAtOnce = int64_t{1} << 22;  // errors that are multiplied at a time
constexpr int64_t kProductColumns = 512;       // products of as many run at full speed

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
  Judge(const Cpu& cpu, const AwqReader& reader)
      : k_(cpu.kernels),
        algebra_(cpu.algebra),
        reader_(reader),
        parallel_(cpu.parallel),
        n_(reader.weight.cols),
        rows_(judged_rows(reader.weight)),
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
  Status run(const std::vector<ScaleCandidate>& all, std::vector<double>* losses) {
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
  Status round(const ScaleCandidate& candidate, float* errors, bool* fits) {
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

Status awq_scale(const Cpu& cpu, const std::vector<AwqReader>& readers, int64_t channels,
                 float* scale, AwqScale* found) {
  std::vector<ScaleCandidate> all;
  const Status status = scale_candidates(cpu.kernels, readers, channels, cpu.parallel, &all);
  if (!status.ok()) return status;
  std::vector<double> losses(all.size(), 0.0);
  for (size_t i = 0; i < readers.size(); ++i) {
    const Status judged = Judge(cpu, readers[i]).run(all, &losses);
    if (!judged.ok()) return judged;
  }
  const ScaleCandidate& best = best_of(all, losses, found);
  std::copy(best.scale.begin(), best.scale.end(), scale);
  return Status::success();
}

}  // namespace bitfold
