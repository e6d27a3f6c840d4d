#include "solvers/panels.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "solvers/row_reader.h"

namespace bitfold {
namespace {

constexpr int kRanks = 16;

// By rank and lane: the pivot above, the level, its code (cpu/kernel_table.h).
void spread_book(const Codebook& book, int64_t lane, float* books) {
  for (int rank = 0; rank < kRanks; ++rank) {
    const int last = std::min(rank, book.pivot_count);
    const int code = book.code_of_rank[last];
    const int64_t at = rank * kPanelLanes + lane;
    books[at] = rank < book.pivot_count ? book.pivots[rank] : INFINITY;
    books[256 + at] = book.levels[code];
    books[512 + at] = static_cast<float>(code);
  }
}

}  // namespace

PanelMatrix::PanelMatrix(const KernelTable& kernels, const Format& stored, int64_t out, int64_t in)
    : k(kernels),
      format(stored),
      encoding(encoding_of(stored)),
      rows(out),
      cols(in),
      panels((out + kPanelLanes - 1) / kPanelLanes),
      groups(stored.family() == Family::kLearnedCodebook ? 1 : stored.groups_per_row(in)),
      group_size(stored.grouping == Grouping::kGroup ? stored.group_size : in),
      weights(new float[static_cast<size_t>(panels * in * kPanelLanes)]),
      codes(new uint8_t[static_cast<size_t>(panels * in * kPanelLanes)]),
      scale(static_cast<size_t>(panels * groups * kPanelLanes), 1.0f),
      zero(scale.size()) {}

Status PanelMatrix::read(const MatrixView& w, const std::vector<uint8_t>& dead,
                         const Parallel& parallel) {
  std::atomic<int64_t> bad_row = rows;
  parallel(panels, grain(cols * kPanelLanes, kGrainWeights), [&](int64_t begin, int64_t end) {
    std::vector<RowReader> readers(kPanelLanes, RowReader(k, w));
    for (int64_t p = begin; p < end; ++p) {
      const float* lanes[kPanelLanes];
      for (int64_t i = 0; i < kPanelLanes; ++i) {
        const int64_t r = p * kPanelLanes + (i < rows_of(p) ? i : 0);
        lanes[i] = readers[static_cast<size_t>(i)](r);
        float low, high;
        int64_t seen = bad_row;
        while (i < rows_of(p) && r < seen && !k.stats(lanes[i], cols, cols, &low, &high) &&
               !bad_row.compare_exchange_weak(seen, r)) {
        }
      }
      k.interleave(lanes, cols, weights_of(p));
      for (int64_t c = 0; c < cols; ++c) {
        if (dead[static_cast<size_t>(c)])
          std::fill_n(weights_of(p) + c * kPanelLanes, kPanelLanes, 0.0f);
      }
    }
  });
  return bad_row < rows ? non_finite_row(k, w, bad_row) : Status::success();
}

void PanelMatrix::read_exact(const uint8_t* exact_entries, const Parallel& parallel) {
  exact.reset(new uint8_t[static_cast<size_t>(panels * cols * kPanelLanes)]);
  parallel(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < kPanelLanes; ++i) {
        const uint8_t* from = exact_entries + (p * kPanelLanes + (i < rows_of(p) ? i : 0)) * cols;
        uint8_t* to = exact.get() + p * cols * kPanelLanes + i;
        for (int64_t c = 0; c < cols; ++c) to[c * kPanelLanes] = from[c];
      }
    }
  });
}

void PanelMatrix::read_books(const PackedView& packed) {
  books.resize(static_cast<size_t>(panels * 3 * 256));
  float levels[kMaxLevels];
  const int count = 1 << format.bits();
  for (int64_t row = 0; row < width(); ++row) {
    const int64_t p = row / kPanelLanes, lane = row % kPanelLanes;
    const int64_t r = lane < rows_of(p) ? row : p * kPanelLanes;
    for (int code = 0; code < count; ++code)
      levels[code] = level_of(packed, r, static_cast<unsigned>(code));
    spread_book(sorted_codebook(levels, count), lane, books.data() + p * 3 * 256);
  }
}

void PanelMatrix::read_packed(const PackedView& packed, const Parallel& parallel) {
  if (format.family() == Family::kLearnedCodebook) read_books(packed);
  parallel(panels, grain(cols * kPanelLanes, kGrainWeights), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> row(static_cast<size_t>(cols));
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < kPanelLanes; ++i) {
        const int64_t r = p * kPanelLanes + (i < rows_of(p) ? i : 0);
        unpack_row(packed.codes + r * packed.row_bytes, cols, packed.bits, row.data());
        for (int64_t c = 0; c < cols; ++c)
          codes_of(p)[c * kPanelLanes + i] = row[static_cast<size_t>(c)];
        if (format.family() == Family::kLearnedCodebook) continue;
        for (int64_t g = 0; g < groups; ++g) {
          scale_of(p)[g * kPanelLanes + i] = bitfold::scale_of(packed, r, g);
          zero_of(p)[g * kPanelLanes + i] =
              format.family() == Family::kInteger ? bitfold::zero_of(packed, r, g) : 0.0f;
        }
      }
    }
  });
}

void PanelMatrix::spread(const std::vector<float>& scales, const std::vector<float>& zeros) {
  for (int64_t row = 0; row < width(); ++row) {
    const int64_t p = row / kPanelLanes, lane = row % kPanelLanes;
    const int64_t r = lane < rows_of(p) ? row : p * kPanelLanes;
    const int64_t first = format.grouping == Grouping::kTensor ? 0 : r * groups;
    for (int64_t g = 0; g < groups; ++g) {
      scale_of(p)[g * kPanelLanes + lane] = scales[static_cast<size_t>(first + g)];
      zero_of(p)[g * kPanelLanes + lane] = zeros[static_cast<size_t>(first + g)];
    }
  }
}

void PanelMatrix::collect(std::vector<float>* scales, std::vector<float>* zeros) const {
  const int64_t stored = format.scale_rows(rows);
  scales->resize(static_cast<size_t>(stored * groups));
  zeros->resize(scales->size());
  for (int64_t r = 0; r < stored; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      const auto from =
          static_cast<size_t>((r / kPanelLanes * groups + g) * kPanelLanes + r % kPanelLanes);
      (*scales)[static_cast<size_t>(r * groups + g)] = scale[from];
      (*zeros)[static_cast<size_t>(r * groups + g)] = zero[from];
    }
  }
}

void PanelMatrix::store_scales(int exponent, ScaleStorage* storage) {
  std::vector<float> scales, zeros;
  collect(&scales, &zeros);
  storage->store_scales(exponent, &scales, &zeros);
  for (int64_t r = 0; r < format.scale_rows(rows); ++r)
    storage->store_zeros(r, zeros.data() + r * groups);
  spread(scales, zeros);
}

void PanelMatrix::store_codes(ScaleStorage* storage, const Parallel& parallel) const {
  parallel(panels, grain(cols * kPanelLanes, kGrainWeights), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> row(static_cast<size_t>(cols));
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < rows_of(p); ++i) {
        const uint8_t* from = codes_of(p) + i;
        for (int64_t c = 0; c < cols; ++c) row[static_cast<size_t>(c)] = from[c * kPanelLanes];
        pack_row(row.data(), cols, format.bits(), storage->codes_of(p * kPanelLanes + i));
      }
    }
  });
}

void PanelMatrix::decode(int64_t p, int64_t c, float* unit) const {
  const uint8_t* code = codes_of(p) + c * kPanelLanes;
  if (format.family() == Family::kInteger) {
    const float* zero_point = zero.data() + (p * groups + c / group_size) * kPanelLanes;
    for (int64_t i = 0; i < kPanelLanes; ++i) unit[i] = static_cast<float>(code[i]) - zero_point[i];
    return;
  }
  if (encoding.book) {
    for (int64_t i = 0; i < kPanelLanes; ++i) unit[i] = encoding.book->levels[code[i]];
    return;
  }
  for (int64_t i = 0; i < kPanelLanes; ++i) {
    const float* book = books_of(p) + i;
    for (int rank = 0; rank < kRanks; ++rank) {
      if (book[512 + rank * kPanelLanes] == static_cast<float>(code[i]))
        unit[i] = book[256 + rank * kPanelLanes];
    }
  }
}

void PanelMatrix::round(int64_t p, float* error, uint8_t* chosen) {
  float factor[kFeedbackColumns] = {}, cost[kFeedbackColumns] = {}, unused[kPanelLanes] = {};
  int32_t column[kFeedbackColumns], group[kFeedbackColumns];
  for (int64_t first = 0; first < cols; first += kFeedbackColumns) {
    const int64_t count = std::min(kFeedbackColumns, cols - first);
    for (int64_t i = 0; i < count; ++i) {
      column[i] = static_cast<int32_t>(first + i);
      group[i] = static_cast<int32_t>((first + i) / group_size);
    }
    k.feed_back(encoding, {count, nullptr, factor, cost, column, group},
                {weights_of(p), scale_of(p), zero_of(p), exact_of(p), books_of(p), kPanelLanes,
                 nullptr, error + first * kPanelLanes, nullptr, chosen, unused});
  }
}

}  // namespace bitfold
