#include <algorithm>
#include <cmath>

#include "core/scale_coding.h"
#include "solvers/awq.h"
#include "solvers/factor.h"
#include "solvers/options.h"
#include "solvers/panel_scales.h"
#include "solvers/scale_search.h"

namespace bitfold {
namespace {

constexpr int kSteps = 9;  // of clipping, from 0.95 to 0.55
constexpr int kCandidates = 1 + kSteps;
constexpr float kFinest = 0.25f;       // below what clipping makes of a scale, with room to spare
constexpr int64_t kTileColumns = 512;  // of one group; what tiles share is left out
constexpr int64_t kPanelsAtOnce =
    8;  // errors of all candidates of a section: 2.6 MB, and H times them

// Columns [begin, end) of a group.
struct Tile {
  int64_t begin, end, group;
};

class ClipSearch {
 public:
  ClipSearch(const Cpu& cpu, const Format& format, Method method, const MatrixView& w,
             const float* hessian, void* const* buffers)
      : algebra_(cpu.algebra),
        method_(method),
        source_(w),
        hessian_(hessian),
        parallel_(cpu.parallel),
        w_(cpu.kernels, format, w.rows, w.cols),
        storage_(cpu.kernels, format, w.rows, w.cols, buffers, cpu.parallel),
        stride_(kCandidates * std::min(kPanelsAtOnce, w_.panels) * kPanelLanes) {
    if (stride_ % 256 == 0) stride_ += 16;  // rows of the same few lines of the cache otherwise
  }

  Status run(const uint8_t* exact, AwqClip* found) {
    const Status status =
        w_.read(source_, std::vector<uint8_t>(static_cast<size_t>(w_.cols)), parallel_);
    if (!status.ok()) return status;
    if (exact) w_.read_exact(exact, parallel_);
    choose_scales(&w_, method_ == Method::kSearch,
                  std::vector<float>(static_cast<size_t>(w_.cols), 1.0f), parallel_);
    exponent_ = exponent(kFinest);
    cut_in_sections();
    for (int64_t first = 0; first < w_.panels; first += kPanelsAtOnce)
      search(first, std::min(kPanelsAtOnce, w_.panels - first), found);
    w_.store_scales(exponent(1.0f), &storage_);
    parallel_(w_.panels, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> error(static_cast<size_t>(w_.cols * kPanelLanes));
      for (int64_t p = begin; p < end; ++p) w_.round(p, error.data(), w_.codes_of(p));
    });
    w_.store_codes(&storage_, parallel_);
    found->groups = w_.rows * w_.groups;
    return Status::success();
  }

 private:
  // The power of two that scales are stored with if some become `finest` times as large.
  int exponent(float finest) const {
    MagnitudeRange range;
    std::vector<float> scales, zeros;
    w_.collect(&scales, &zeros);
    range.add(scales.data(), static_cast<int64_t>(scales.size()));
    range.smallest *= finest;
    return choose_exponent(range);
  }

  // Groups that are narrow together, wide ones tile by tile.
  void cut_in_sections() {
    int64_t width = kTileColumns;  // of the last section
    for (int64_t g = 0; g < w_.groups; ++g) {
      const int64_t last = std::min(w_.cols, (g + 1) * w_.group_size);
      for (int64_t at = g * w_.group_size; at < last; at += kTileColumns) {
        const Tile tile{at, std::min(last, at + kTileColumns), g};
        width += tile.end - tile.begin;
        if (width > kTileColumns) {
          sections_.emplace_back();
          width = tile.end - tile.begin;
        }
        sections_.back().push_back(tile);
      }
    }
  }

  // body(panel counted from `first_`, item) for each of `items` of each panel.
  template <class Body>
  void each(int64_t items, const Body& body) const {
    parallel_(count_ * items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / items, i % items);
    });
  }

  // Of the panels [first, first + count).
  void search(int64_t first, int64_t count, AwqClip* found) {
    first_ = first, count_ = count;
    const auto all = static_cast<size_t>(count * w_.groups * kCandidates * kPanelLanes);
    scale_.resize(all), zero_.resize(all), loss_.assign(all, 0.0);
    each(w_.groups, [&](int64_t p, int64_t g) { propose(p, g); });
    for (const std::vector<Tile>& section : sections_) {
      const int64_t low = section.front().begin;
      const auto area = static_cast<size_t>((section.back().end - low) * stride_);
      if (error_.size() < area) error_.resize(area), product_.resize(area);
      const auto tiles = static_cast<int64_t>(section.size());
      each(tiles, [&](int64_t p, int64_t i) {
        const Tile& tile = section[static_cast<size_t>(i)];
        round(p, tile, error_.data() + (tile.begin - low) * stride_);
      });
      for (const Tile& tile : section) {
        const int64_t n = tile.end - tile.begin, at = (tile.begin - low) * stride_;
        algebra_.gemm(false, false, n, count * kCandidates * kPanelLanes, n, 1.0f,
                      hessian_ + tile.begin * w_.cols + tile.begin, w_.cols, error_.data() + at,
                      stride_, 0.0f, product_.data() + at, stride_);
      }
      each(tiles, [&](int64_t p, int64_t i) {
        const Tile& tile = section[static_cast<size_t>(i)];
        add_losses(p, tile, (tile.begin - low) * stride_);
      });
    }
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t g = 0; g < w_.groups; ++g) take_best(p, g, found);
    }
  }

  // Where the candidates of a group are: [candidates, 16].
  size_t at(int64_t p, int64_t g) const {
    return static_cast<size_t>((p * w_.groups + g) * kCandidates * kPanelLanes);
  }

  void propose(int64_t p, int64_t g) {
    float *scale = &scale_[at(p, g)], *zero = &zero_[at(p, g)];
    std::copy_n(w_.scale_of(first_ + p) + g * kPanelLanes, kPanelLanes, scale);
    std::copy_n(w_.zero_of(first_ + p) + g * kPanelLanes, kPanelLanes, zero);
    const int64_t begin = g * w_.group_size;
    float least[kPanelLanes], most[kPanelLanes];
    extremes(w_.weights_of(first_ + p) + begin * kPanelLanes,
             std::min(w_.group_size, w_.cols - begin), least, most);
    float low[kSteps * kPanelLanes], high[kSteps * kPanelLanes];
    for (int step = 0; step < kSteps; ++step) {
      const float share = 1.0f - static_cast<float>(step + 1) / 20.0f;
      for (int64_t i = 0; i < kPanelLanes; ++i) {
        const float limit = share * std::max(std::fabs(least[i]), std::fabs(most[i]));
        low[step * kPanelLanes + i] = std::max(least[i], -limit);
        high[step * kPanelLanes + i] = std::min(most[i], limit);
      }
    }
    round_scales(w_.k, w_.encoding, kSteps * kPanelLanes, low, high, scale + kPanelLanes,
                 zero + kPanelLanes);
    storage_.round(exponent_, kCandidates * kPanelLanes, scale, zero);
  }

  // error [tile, candidates x panels x 16]
  void round(int64_t p, const Tile& tile, float* error) {
    const float factor[kFeedbackColumns] = {};
    float unused[kPanelLanes] = {};
    int32_t column[kFeedbackColumns], group[kFeedbackColumns] = {};
    for (int64_t first = tile.begin; first < tile.end; first += kFeedbackColumns) {
      const int64_t columns = std::min(kFeedbackColumns, tile.end - first);
      for (int64_t i = 0; i < columns; ++i) column[i] = static_cast<int32_t>(first + i);
      for (int64_t c = 0; c < kCandidates; ++c) {
        const size_t choice = at(p, tile.group) + static_cast<size_t>(c * kPanelLanes);
        w_.k.feed_back(w_.encoding, {columns, nullptr, factor, factor, column, group},
                       {w_.weights_of(first_ + p), &scale_[choice], &zero_[choice],
                        w_.exact_of(first_ + p), nullptr, stride_, nullptr,
                        error + (first - tile.begin) * stride_ + (c * count_ + p) * kPanelLanes,
                        nullptr, w_.codes_of(first_ + p), unused});
      }
    }
  }

  void add_losses(int64_t p, const Tile& tile, int64_t from) {
    double* const loss = &loss_[at(p, tile.group)];
    for (int64_t c = 0; c < kCandidates; ++c) {
      float sum[kPanelLanes] = {};
      for (int64_t j = 0; j < tile.end - tile.begin; ++j) {
        const int64_t row = from + j * stride_ + (c * count_ + p) * kPanelLanes;
        const float *e = error_.data() + row, *he = product_.data() + row;
        for (int64_t i = 0; i < kPanelLanes; ++i) sum[i] += e[i] * he[i];
      }
      for (int64_t i = 0; i < kPanelLanes; ++i) loss[c * kPanelLanes + i] += sum[i];
    }
  }

  void take_best(int64_t p, int64_t g, AwqClip* found) {
    const double* const loss = &loss_[at(p, g)];
    for (int64_t i = 0; i < kPanelLanes; ++i) {
      int64_t best = 0;
      for (int64_t c = 1; c < kCandidates; ++c)
        if (loss[c * kPanelLanes + i] < loss[best * kPanelLanes + i]) best = c;
      const size_t choice = at(p, g) + static_cast<size_t>(best * kPanelLanes + i);
      w_.scale_of(first_ + p)[g * kPanelLanes + i] = scale_[choice];
      w_.zero_of(first_ + p)[g * kPanelLanes + i] = zero_[choice];
      if (i >= w_.rows_of(first_ + p)) continue;
      found->clipped += best > 0;
      found->before += loss[i];
      found->after += loss[best * kPanelLanes + i];
    }
  }

  const LinearAlgebra& algebra_;
  const Method method_;
  const MatrixView& source_;
  const float* hessian_;
  const Parallel& parallel_;
  PanelMatrix w_;
  ScaleStorage storage_;
  int64_t stride_;
  int exponent_ = 0;
  std::vector<std::vector<Tile>> sections_;
  int64_t first_ = 0, count_ = 0;  // panels at work
  // [panels at work, groups, candidates, 16]
  std::vector<float> scale_, zero_;
  std::vector<double> loss_;
  std::vector<float> error_, product_;  // [columns of a section, stride]
};

}  // namespace

Status awq_clip(const Cpu& cpu, const Format& format, Method method, const MatrixView& w,
                const float* hessian, const uint8_t* exact, void* const* buffers, AwqClip* found) {
  Status status = check_awq_clip(format, w);
  if (status.ok()) status = HessianView{hessian, false, w.cols}.check_finite(cpu.parallel);
  if (!status.ok()) return status;
  *found = {};
  return ClipSearch(cpu, format, method, w, hessian, buffers).run(exact, found);
}

}  // namespace bitfold
