// Where the groups of weights lie whose scales are searched: spans of rows, or a whole tensor.
#pragma once

#include <vector>

#include "core/parallel.h"
#include "core/view.h"
#include "solvers/scale_search.h"

namespace bitfold {

// Sixteen spans of equal size, interleaved.
class SpanBlock : public GroupProbe {
 public:
  SpanBlock(const KernelTable& k, const Encoding& encoding) : k_(k), encoding_(encoding) {}
  // spans [count] of n weights each; absent ones are copies of the first.
  void fill(const float* const* spans, int64_t count, int64_t n);

  double total(int /*lane*/) const override { return static_cast<double>(n_); }
  void errors(int64_t count, const float* scale, const float* zero, float* errors) const override;
  void fit(const float* scale, const float* zero, SpanFits* fits) const override;

 private:
  const KernelTable& k_;
  const Encoding& encoding_;
  std::vector<float> block_;
  int64_t n_ = 0;
};

// Searches the scales of some rows, sixteen spans of equal size at a time.
class SpanSearch {
 public:
  SpanSearch(const KernelTable& k, const Encoding& encoding, int64_t cols, int64_t group_size)
      : k_(k),
        encoding_(encoding),
        cols_(cols),
        group_size_(group_size),
        groups_((cols + group_size - 1) / group_size),
        block_(k, encoding) {}

  // rows [count] of `cols` weights each; low, high, scale and zero [count, groups].
  void run(const float* const* rows, int64_t count, const float* low, const float* high,
           float* scale, float* zero);

 private:
  void search(int64_t count, int64_t size, const float* low, const float* high, float* scale,
              float* zero);

  const KernelTable& k_;
  const Encoding& encoding_;
  const int64_t cols_, group_size_, groups_;
  SpanBlock block_;
  const float* spans_[kSpanLanes] = {};
  int64_t group_of_lane_[kSpanLanes] = {};
};

// All rows as one group, the same in every lane: sums per row first, then over rows in order, the
// same for every number of threads.
class WholeTensor : public GroupProbe {
 public:
  WholeTensor(const KernelTable& k, const Encoding& encoding, const MatrixView& w,
              const Parallel& parallel)
      : k_(k), encoding_(encoding), w_(w), parallel_(parallel) {}

  double total(int /*lane*/) const override {
    return static_cast<double>(w_.rows) * static_cast<double>(w_.cols);
  }
  void errors(int64_t count, const float* scale, const float* zero, float* errors) const override;
  void fit(const float* scale, const float* zero, SpanFits* fits) const override;

 private:
  int64_t blocks() const { return (w_.rows + kSpanLanes - 1) / kSpanLanes; }
  // body(index of the block, its sixteen rows)
  template <class Body>
  void each_block(const Body& body) const;

  const KernelTable& k_;
  const Encoding& encoding_;
  const MatrixView& w_;
  const Parallel& parallel_;
};

}  // namespace bitfold
