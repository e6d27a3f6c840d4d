#include "solvers/cuda/layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/float16.h"
#include "solvers/row_reader.h"

namespace bitfold {
namespace {

Status bad_weight(GpuRun* run, const MatrixView& w, int64_t at) {
  const int64_t row = at / w.cols, col = at % w.cols;
  const void* address = advance(w.data, w.dtype, row * w.row_stride + col * w.col_stride);
  float value;
  if (w.dtype == FloatType::kFloat32) {
    value = run->download(static_cast<const float*>(address), 1)[0];
  } else {
    const uint16_t bits = run->download(static_cast<const uint16_t*>(address), 1)[0];
    value = w.dtype == FloatType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
  }
  return non_finite_weight(row, col, std::isnan(value));
}

Status bad_mean(GpuRun* run, const char* name, const cuda::MeanView& mean, int64_t at) {
  const bool nan = mean.fp64
                       ? std::isnan(run->download(static_cast<const double*>(mean.data) + at, 1)[0])
                       : std::isnan(run->download(static_cast<const float*>(mean.data) + at, 1)[0]);
  return non_finite_entry(name, at / mean.n, at % mean.n, nan);
}

}  // namespace

std::vector<double> look_at(GpuRun* run, const cuda::MeanView& mean, const float* cross,
                            const MatrixView& weight) {
  constexpr int kLooked = 3;  // mean, cross, weight: the first bad place in each
  const cuda::MeanView other{cross, /*fp64=*/false, mean.n};
  auto* device = run->gpu.memory<double>(kLooked + mean.n);
  auto* first = reinterpret_cast<unsigned long long*>(device);
  unsigned long long found[kLooked] = {cuda::kNone, cuda::kNone, cuda::kNone};
  run->note(cuda::copy_to_device(first, found, sizeof found, run->stream));
  run->note(cuda::find_non_finite(mean, first, run->stream));
  if (cross) run->note(cuda::find_non_finite(other, first + 1, run->stream));
  run->note(cuda::find_non_finite(weight, first + 2, run->stream));
  run->note(cuda::read_diagonal(mean, device + kLooked, run->stream));
  std::vector<double> all = run->download(device, kLooked + mean.n);
  std::memcpy(found, all.data(), sizeof found);
  all.erase(all.begin(), all.begin() + kLooked);
  if (!run->ok()) return all;
  if (found[0] != cuda::kNone) {
    run->note(bad_mean(run, "hessian", mean, static_cast<int64_t>(found[0])));
  } else if (found[1] != cuda::kNone) {
    run->note(bad_mean(run, "cross", other, static_cast<int64_t>(found[1])));
  } else if (found[2] != cuda::kNone) {
    run->note(bad_weight(run, weight, static_cast<int64_t>(found[2])));
  }
  return all;
}

GpuFactor factorize(GpuRun* run, const cuda::MeanView& mean, const std::vector<double>& diagonal,
                    ColumnOrder order, int64_t group_size, double damping, bool keep_hessian) {
  const int64_t n = mean.n;
  GpuFactor factor{};
  Factorization& f = factor.f;
  f = begin_factorization(diagonal, order_columns(order, diagonal, group_size));
  std::vector<int32_t> position(f.column.size());
  for (size_t a = 0; a < position.size(); ++a)
    position[static_cast<size_t>(f.column[a])] = static_cast<int32_t>(a);
  factor.places = {run->upload(f.column), run->upload(position), run->upload(f.dead)};
  factor.lower = run->gpu.memory<float>(n * n);
  factor.hessian = keep_hessian ? run->gpu.memory<float>(n * n) : nullptr;
  auto* own = run->gpu.memory<double>(n);
  factor.own_on_gpu = own;

  const auto arrange = [&](bool fp64, void* to) {
    run->note(cuda::arrange(mean, factor.places.column, factor.places.dead, f.added, fp64, to,
                            run->stream));
  };
  const auto read_own = [&](const cuda::MeanView& of) {
    run->note(cuda::read_diagonal(of, own, run->stream));
    const std::vector<double> values = run->download(own, n);
    factor.own.assign(values.begin(), values.end());
  };
  double* wide = nullptr;
  const auto attempt = [&](bool fp64) {
    if (!run->ok()) return false;
    if (!fp64) {
      arrange(false, factor.lower);
      if (factor.hessian) arrange(false, factor.hessian);
      if (!run->gpu.algebra.cholesky(n, factor.lower)) return false;
      read_own({factor.lower, false, n});
      return true;
    }
    if (!wide) wide = run->gpu.memory<double>(n * n);
    arrange(true, wide);
    if (!run->gpu.algebra.cholesky64(n, wide)) return false;
    read_own({wide, true, n});
    run->note(cuda::narrow(wide, n * n, factor.lower, run->stream));
    // In float32 the factor must stay one: no diagonal may vanish.
    return std::all_of(factor.own.begin(), factor.own.end(), [](float v) { return v > 0.0f; });
  };
  climb_damping(diagonal, damping, attempt, &f);
  return factor;
}

GpuFactor without_factor(GpuRun* run, int64_t n) {
  GpuFactor factor{};
  factor.f = begin_factorization(
      std::vector<double>(static_cast<size_t>(n), 1.0),
      order_columns(ColumnOrder::kGiven, std::vector<double>(static_cast<size_t>(n)), n));
  factor.places.dead = run->upload(factor.f.dead);
  return factor;
}

GpuLayer lay_out(GpuRun* run, const Format& format, const MatrixView& weight,
                 const GpuFactor& factor, const uint8_t* exact) {
  const int64_t rows = weight.rows, n = weight.cols, stride = (rows + 3) / 4 * 4;
  const cuda::Spans spans = cuda::spans_of(format, rows, n);
  const auto floats = [&](int64_t count) { return run->gpu.memory<float>(count * stride); };
  const auto bytes = [&] { return run->gpu.memory<uint8_t>(n * stride); };
  cuda::RoundingMatrix w{rows,      n,       spans.groups,         spans.group_size,     stride,
                         floats(n), nullptr, floats(spans.groups), floats(spans.groups), bytes()};
  run->note(cuda::lay_out_weights(weight, factor.places.dead, w, run->stream));
  if (exact) {
    uint8_t* const turned = bytes();
    run->note(cuda::lay_out_exact(exact, rows, n, stride, turned, run->stream));
    w.exact = turned;
  }
  return {w, cuda::make_encoding(format), factor.places, factor.lower, factor.hessian, factor.f};
}

}  // namespace bitfold
