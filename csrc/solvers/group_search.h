// Where the groups of weights lie whose scales are searched: spans of rows, or a whole tensor.
#pragma once

#include <algorithm>
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
  void best_choice(const float* low, const float* high, int64_t count, const float* scale,
                   const float* zero, float* best_scale, float* best_zero,
                   float* least) const override;
  void fit(const float* scale, const float* zero, SpanFits* fits) const override;

 private:
  const KernelTable& k_;
  const Encoding& encoding_;
  std::vector<float> block_;
  mutable std::vector<int16_t> words_;  // scratch
  int64_t n_ = 0;
};

// Cuts rows [count] of `cols` weights in groups, and calls take(lanes, size, spans, groups) for up
// to sixteen at a time, all of `size` weights; groups [lanes] says which ones, of [count, groups].
template <class Take>
void each_sixteen_spans(const float* const* rows, int64_t count, int64_t cols, int64_t group_size,
                        const Take& take) {
  const int64_t groups = (cols + group_size - 1) / group_size, tail = cols % group_size;
  const float* spans[kSpanLanes] = {};
  int64_t group_of_lane[kSpanLanes] = {};
  for (int64_t size : {group_size, tail}) {  // the last span of a row may be shorter
    int64_t lanes = 0;
    for (int64_t g = 0; size > 0 && g < count * groups; ++g) {
      const int64_t at = g % groups * group_size;
      if (std::min(group_size, cols - at) == size) {
        spans[lanes] = rows[g / groups] + at;
        group_of_lane[lanes++] = g;
      }
      if (lanes == kSpanLanes || (lanes > 0 && g + 1 == count * groups)) {
        take(lanes, size, spans, group_of_lane);
        lanes = 0;
      }
    }
  }
}

// Searches the scales of some rows, sixteen spans of equal size at a time.
class SpanSearch {
 public:
  SpanSearch(const KernelTable& k, const Encoding& encoding, int64_t cols, int64_t group_size)
      : k_(k), encoding_(encoding), cols_(cols), group_size_(group_size), block_(k, encoding) {}

  // rows [count] of `cols` weights each; low, high, scale and zero [count, groups].
  void run(const float* const* rows, int64_t count, const float* low, const float* high,
           float* scale, float* zero);

 private:
  void search(int64_t count, const int64_t* groups, const float* low, const float* high,
              float* scale, float* zero);

  const KernelTable& k_;
  const Encoding& encoding_;
  const int64_t cols_, group_size_;
  SpanBlock block_;
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
