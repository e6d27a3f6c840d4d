#include <algorithm>
#include <cmath>

#include "cuda/awq.h"
#include "cuda/kernels.h"
#include "solvers/awq_grid.h"
#include "solvers/cuda/awq.h"
#include "solvers/cuda/layer.h"

namespace bitfold {
namespace {

constexpr int64_t kAtOnce = int64_t{1} << 26;  // errors that are multiplied at a time
constexpr int64_t kProductColumns = 1024;      // products of as many run at full speed

// What rounding some rows of one reader leaves with one scale after another.
class GpuJudge {
 public:
  GpuJudge(GpuRun* run, const AwqReader& reader)
      : run_(*run),
        reader_(reader),
        n_(reader.weight.cols),
        rows_(judged_rows(reader.weight)),
        weight_(run->gpu.memory<float>(rows_ * n_)),
        scaled_(run->gpu.memory<float>(rows_ * n_)),
        scratch_(run->gpu.allocate(cuda::quantize_scratch_bytes(reader.format, rows_, n_))) {
    for (const BufferSpec& spec : reader.format.buffers(rows_, n_))
      buffers_.push_back(run->gpu.allocate(spec.nbytes()));
    run_.note(cuda::pick_rows(reader.weight, rows_, weight_, run_.stream));
  }

  // losses[i] += tokens * the loss of all rows for candidate i, infinite where scaling overflows.
  // Candidates lie one after the other in `scales`, `channels` apart.
  void run(const float* scales, int64_t channels, std::vector<double>* losses) {
    const double share = static_cast<double>(reader_.weight.rows) / static_cast<double>(rows_) *
                         static_cast<double>(reader_.tokens);
    const auto all = static_cast<int64_t>(losses->size());
    const int64_t most = std::clamp<int64_t>(kAtOnce / (rows_ * n_), 1, all);
    errors_ = run_.gpu.memory<float>(most * rows_ * n_);
    products_ = run_.gpu.memory<float>(most * rows_ * std::min(n_, kProductColumns));
    auto* sums = run_.gpu.memory<double>(all * rows_);
    run_.note(cuda::clear(sums, all * rows_ * 8, run_.stream));
    for (int64_t first = 0; first < all; first += most) {
      const int64_t count = std::min(most, all - first);
      for (int64_t i = 0; i < count; ++i)
        round(scales + (first + i) * channels, errors_ + i * rows_ * n_);
      multiply(count * rows_, sums + first * rows_);
    }
    const std::vector<double> of_rows = run_.download(sums, all * rows_);
    for (int64_t i = 0; i < all; ++i) {
      double loss = 0.0;
      for (int64_t r = 0; r < rows_; ++r) loss += of_rows[static_cast<size_t>(i * rows_ + r)];
      // NaN is of weights or products beyond floats, which no candidate wins with.
      (*losses)[static_cast<size_t>(i)] += std::isnan(loss) ? INFINITY : share * loss;
    }
  }

 private:
  // errors [rows, n] = decoded / scale - w.
  void round(const float* by, float* errors) {
    const Format& format = reader_.format;
    run_.note(cuda::scale_columns(weight_, rows_, n_, reader_.channel, by, scaled_, run_.stream));
    run_.note(cuda::quantize(format, reader_.method,
                             {scaled_, FloatType::kFloat32, rows_, n_, n_, 1}, buffers_.data(),
                             scratch_, run_.stream));
    const std::vector<const void*> read(buffers_.begin(), buffers_.end());
    run_.note(cuda::dequantize(cuda::make_device_weight(format, rows_, n_, read.data()),
                               FloatType::kFloat32, errors, run_.stream));
    run_.note(cuda::unscale_errors(weight_, rows_, n_, reader_.channel, by, errors, run_.stream));
  }

  // sums [rows] += e H e of each row of errors: H is symmetric, so a panel of its columns is
  // multiplied by what comes before its own rows alone, which counts twice.
  void multiply(int64_t rows, double* sums) {
    for (int64_t first = 0; first < n_; first += kProductColumns) {
      const int64_t width = std::min(kProductColumns, n_ - first);
      const float* h = reader_.hessian;
      const auto& gemm = run_.gpu.algebra.gemm;
      gemm(false, false, rows, width, width, 1.0f, errors_ + first, n_, h + first * n_ + first, n_,
           0.0f, products_, width);
      if (first > 0) {
        gemm(false, false, rows, width, first, 2.0f, errors_, n_, h + first, n_, 1.0f, products_,
             width);
      }
      run_.note(cuda::add_dots(errors_ + first, rows, n_, products_, width, sums, run_.stream));
    }
  }

  GpuRun& run_;
  const AwqReader& reader_;
  const int64_t n_, rows_;
  float *weight_, *scaled_;  // [rows, n]
  void* scratch_;
  std::vector<void*> buffers_;
  float *errors_ = nullptr, *products_ = nullptr;  // of several candidates
};

// Takes a reader into the grid, once its values are looked at.
Status add_reader(GpuRun* run, const AwqReader& reader, int64_t channels, ScaleGrid* grid) {
  const MatrixView& w = reader.weight;
  AwqReader here = reader;
  const std::vector<int64_t> channel = run->download(reader.channel, w.cols);
  const std::vector<float> magnitude = run->download(reader.magnitude, w.cols);
  here.channel = channel.data();
  here.magnitude = magnitude.data();
  if (!run->ok()) return run->status();
  if (Status status = check_reader(here, channels); !status.ok()) return status;
  look_at(run, {reader.hessian, false, w.cols}, nullptr, w);
  if (!run->ok()) return run->status();
  auto* sums = run->gpu.memory<double>(w.cols);
  auto* partial = run->gpu.memory<float>(cuda::share_blocks(w.rows) * w.cols);
  const int64_t group =
      reader.format.grouping == Grouping::kGroup ? reader.format.group_size : w.cols;
  run->note(cuda::sum_shares(w, group, partial, sums, run->stream));
  std::vector<double> shares = run->download(sums, w.cols);
  for (double& share : shares) share /= static_cast<double>(w.rows);
  grid->add(here, shares);
  return run->status();
}

}  // namespace

bool can_scale_on_gpu(const std::vector<AwqReader>& readers) {
  return std::all_of(readers.begin(), readers.end(), [](const AwqReader& reader) {
    return cuda::can_quantize(reader.format, reader.method);
  });
}

Status awq_scale(const Gpu& gpu, const std::vector<AwqReader>& readers, int64_t channels,
                 float* scale, AwqScale* found) {
  if (Status status = check_grid(readers.size(), channels); !status.ok()) return status;
  if (!can_scale_on_gpu(readers)) {
    return Status::error(StatusCode::kInvalidArgument,
                         "learned codebooks, outliers and one searched scale for the tensor are "
                         "judged on the CPU only; move the readers there");
  }
  GpuRun run(gpu, /*timed=*/false);
  ScaleGrid grid(channels);
  for (size_t i = 0; i < readers.size(); ++i) {
    if (Status status = add_reader(&run, readers[i], channels, &grid); !status.ok())
      return in_reader(i, status);
  }
  const std::vector<ScaleCandidate> all = grid.finish();
  std::vector<float> scales;
  for (const ScaleCandidate& candidate : all)
    scales.insert(scales.end(), candidate.scale.begin(), candidate.scale.end());
  const float* on_gpu = run.upload(scales);
  std::vector<double> losses(all.size(), 0.0);
  for (const AwqReader& reader : readers) GpuJudge(&run, reader).run(on_gpu, channels, &losses);
  const ScaleCandidate& best = best_of(all, losses, found);
  run.note(cuda::copy_to_device(scale, best.scale.data(), channels * 4, run.stream));
  return run.status();
}

}  // namespace bitfold
