#include "solvers/hqq.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/bitpack.h"
#include "solvers/group_search.h"
#include "solvers/quantize.h"
#include "solvers/row_reader.h"

namespace bitfold {
namespace {

constexpr float kFarthestZero = 2048.0f;  // where fp16 ceases to resolve whole codes

void round_to_halves(const KernelTable& k, const float* values, float* rounded) {
  uint16_t halves[kSpanLanes];
  k.from_float(values, kSpanLanes, FloatType::kFloat16, halves);
  k.to_float(halves, FloatType::kFloat16, kSpanLanes, rounded);
}

// Improves zero [16] for the lanes of a block of spans of n weights each.
void solve(const KernelTable& k, int bits, const HqqOptions& options, const float* block, int64_t n,
           const float* scale, float* zero) {
  float wanted[kSpanLanes], stored[kSpanLanes], least[kSpanLanes];
  bool active[kSpanLanes];
  std::copy_n(zero, kSpanLanes, wanted);
  std::fill_n(active, kSpanLanes, true);
  float beta = options.beta;
  for (int64_t step = 0; step < options.iterations; ++step, beta *= options.kappa) {
    ShrinkSums sums;
    round_to_halves(k, wanted, stored);
    k.shrink(bits, block, n, scale, stored, options.p, beta, &sums);
    for (int i = 0; i < kSpanLanes; ++i) {
      active[i] = active[i] && (step == 0 || sums.error[i] <= least[i]);
      if (!active[i]) continue;
      least[i] = sums.error[i];
      zero[i] = stored[i];
      wanted[i] -= sums.pull[i] / static_cast<float>(n);
      active[i] = std::fabs(wanted[i]) <= kFarthestZero;  // false for NaN
      if (!active[i]) wanted[i] = stored[i];
    }
    if (std::none_of(active, active + kSpanLanes, [](bool one) { return one; })) return;
  }
}

// Rows [first, first + count) of `view`, whose scales stay and whose zero points and codes are
// replaced.
class RowSolver {
 public:
  RowSolver(const KernelTable& k, const HqqOptions& options, const PackedView& view)
      : k_(k), options_(options), view_(view), encoding_{view.bits, Zero::kFloat, nullptr} {}

  void run(const float* const* rows, int64_t first, int64_t count) {
    const int64_t groups = view_.groups;
    scale_.resize(static_cast<size_t>(count * groups));
    zero_.resize(scale_.size());
    for (int64_t i = 0; i < count * groups; ++i) {
      scale_[static_cast<size_t>(i)] = scale_of(view_, first + i / groups, i % groups);
      zero_[static_cast<size_t>(i)] = zero_of(view_, first + i / groups, i % groups);
    }
    each_sixteen_spans(rows, count, view_.cols, view_.group_size,
                       [&](int64_t lanes, int64_t size, const float* const* spans,
                           const int64_t* of_lane) { solve_spans(lanes, size, spans, of_lane); });
    for (int64_t i = 0; i < count; ++i) store(rows[i], first + i, i * groups);
  }

 private:
  void solve_spans(int64_t lanes, int64_t size, const float* const* spans, const int64_t* of_lane) {
    const float* all[kSpanLanes];
    float scale[kSpanLanes], zero[kSpanLanes];
    for (int64_t i = 0; i < kSpanLanes; ++i) {
      const int64_t lane = i < lanes ? i : 0;  // absent ones are copies of the first
      all[i] = spans[lane];
      scale[i] = scale_[static_cast<size_t>(of_lane[lane])];
      zero[i] = zero_[static_cast<size_t>(of_lane[lane])];
    }
    block_.resize(static_cast<size_t>(kSpanLanes * size));
    k_.interleave(all, size, block_.data());
    solve(k_, view_.bits, options_, block_.data(), size, scale, zero);
    for (int64_t i = 0; i < lanes; ++i) zero_[static_cast<size_t>(of_lane[i])] = zero[i];
  }

  // The buffers are ours to write: hqq_solve() was handed them as such.
  void store(const float* w, int64_t row, int64_t at) {
    auto* halves = static_cast<uint16_t*>(const_cast<void*>(view_.zero)) + row * view_.groups;
    k_.from_float(&zero_[static_cast<size_t>(at)], view_.groups, FloatType::kFloat16, halves);
    k_.encode(encoding_, w, view_.cols, view_.group_size, &scale_[static_cast<size_t>(at)],
              &zero_[static_cast<size_t>(at)],
              const_cast<uint8_t*>(view_.codes) + row * view_.row_bytes);
  }

  const KernelTable& k_;
  const HqqOptions& options_;
  const PackedView& view_;
  const Encoding encoding_;
  std::vector<float> block_, scale_, zero_;
};

}  // namespace

Status hqq_solve(const Cpu& cpu, const Format& format, const HqqOptions& options,
                 const MatrixView& w, void* const* buffers) {
  const KernelTable& k = cpu.kernels;
  Status status = check_hqq(format, options);
  if (status.ok()) status = quantize(k, format, Method::kSearch, w, buffers, cpu.parallel);
  if (!status.ok()) return status;
  const std::vector<const void*> read(buffers, buffers + format.buffers(w.rows, w.cols).size());
  const PackedView view = make_view(format, w.rows, w.cols, read.data());
  // As few rows as have a multiple of sixteen groups.
  const int64_t rows = kSpanLanes / std::gcd<int64_t>(kSpanLanes, view.groups);
  cpu.parallel((w.rows + rows - 1) / rows, grain(w.cols * rows, kGrainWeights),
               [&](int64_t begin, int64_t end) {
                 std::vector<RowReader> readers(static_cast<size_t>(rows), RowReader(k, w));
                 std::vector<const float*> sources(readers.size());
                 RowSolver solver(k, options, view);
                 for (int64_t block = begin; block < end; ++block) {
                   const int64_t first = block * rows, count = std::min(rows, w.rows - first);
                   for (int64_t i = 0; i < count; ++i)
                     sources[static_cast<size_t>(i)] = readers[static_cast<size_t>(i)](first + i);
                   solver.run(sources.data(), first, count);
                 }
               });
  return Status::success();
}

}  // namespace bitfold
