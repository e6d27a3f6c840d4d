#include "solvers/group_search.h"

#include "solvers/row_reader.h"

namespace bitfold {

void SpanBlock::fill(const float* const* spans, int64_t count, int64_t n) {
  const float* all[kSpanLanes];
  for (int64_t i = 0; i < kSpanLanes; ++i) all[i] = spans[i < count ? i : 0];
  block_.resize(static_cast<size_t>(kSpanLanes * n));
  words_.resize(static_cast<size_t>(kSpanLanes * n));
  n_ = n;
  k_.interleave(all, n, block_.data());
}

void SpanBlock::errors(int64_t count, const float* scale, const float* zero, float* errors) const {
  k_.errors(encoding_, block_.data(), n_, count, scale, zero, errors);
}

void SpanBlock::best_choice(const float* low, const float* high, int64_t count, const float* scale,
                            const float* zero, float* best_scale, float* best_zero,
                            float* least) const {
  k_.best_choice(encoding_, block_.data(), n_, low, high, count, scale, zero, words_.data(),
                 best_scale, best_zero, least);
}

void SpanBlock::fit(const float* scale, const float* zero, SpanFits* fits) const {
  k_.fit(encoding_, block_.data(), n_, scale, zero, fits);
}

void SpanSearch::run(const float* const* rows, int64_t count, const float* low, const float* high,
                     float* scale, float* zero) {
  each_sixteen_spans(
      rows, count, cols_, group_size_,
      [&](int64_t lanes, int64_t size, const float* const* spans, const int64_t* groups) {
        block_.fill(spans, lanes, size);
        search(lanes, groups, low, high, scale, zero);
      });
}

void SpanSearch::search(int64_t count, const int64_t* groups, const float* low, const float* high,
                        float* scale, float* zero) {
  float lows[kSpanLanes], highs[kSpanLanes], scales[kSpanLanes], zeros[kSpanLanes];
  for (int64_t i = 0; i < kSpanLanes; ++i) {
    lows[i] = low[groups[i < count ? i : 0]];
    highs[i] = high[groups[i < count ? i : 0]];
  }
  search_scales(k_, encoding_, block_, lows, highs, scales, zeros);
  for (int64_t i = 0; i < count; ++i) {
    scale[groups[i]] = scales[i];
    zero[groups[i]] = zeros[i];
  }
}

template <class Body>
void WholeTensor::each_block(const Body& body) const {
  parallel_(blocks(), grain(w_.cols * kSpanLanes, kGrainWeights), [&](int64_t begin, int64_t end) {
    std::vector<RowReader> readers(kSpanLanes, RowReader(k_, w_));
    SpanBlock block(k_, encoding_);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = std::min<int64_t>(kSpanLanes, w_.rows - b * kSpanLanes);
      const float* rows[kSpanLanes] = {};
      for (int64_t i = 0; i < count; ++i)
        rows[i] = readers[static_cast<size_t>(i)](b * kSpanLanes + i);
      block.fill(rows, count, w_.cols);
      body(b, block);
    }
  });
}

void WholeTensor::errors(int64_t count, const float* scale, const float* zero,
                         float* errors) const {
  const int64_t stride = count * kSpanLanes;  // of a block
  std::vector<float> of_rows(static_cast<size_t>(blocks() * stride));
  each_block([&](int64_t b, const SpanBlock& block) {
    block.errors(count, scale, zero, of_rows.data() + b * stride);
  });
  for (int64_t c = 0; c < count; ++c) {
    double total = 0.0;
    for (int64_t r = 0; r < w_.rows; ++r) {
      const int64_t lane = r % kSpanLanes;
      total += of_rows[static_cast<size_t>(r / kSpanLanes * stride + c * kSpanLanes + lane)];
    }
    std::fill_n(errors + c * kSpanLanes, kSpanLanes, static_cast<float>(total));
  }
}

void WholeTensor::fit(const float* scale, const float* zero, SpanFits* fits) const {
  std::vector<SpanFits> of_rows(static_cast<size_t>(blocks()));
  each_block([&](int64_t b, const SpanBlock& block) {
    block.fit(scale, zero, &of_rows[static_cast<size_t>(b)]);
  });
  const auto total = [&](const auto& sums_of) {
    double sum = 0.0;
    for (int64_t r = 0; r < w_.rows; ++r)
      sum += sums_of(of_rows[static_cast<size_t>(r / kSpanLanes)])[r % kSpanLanes];
    std::fill_n(sums_of(*fits), kSpanLanes, static_cast<float>(sum));
  };
  total([](SpanFits& sums) { return sums.error; });
  total([](SpanFits& sums) { return sums.wd; });
  total([](SpanFits& sums) { return sums.dd; });
  total([](SpanFits& sums) { return sums.w; });
  total([](SpanFits& sums) { return sums.d; });
}

}  // namespace bitfold
