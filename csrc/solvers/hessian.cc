#include "solvers/hessian.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "solvers/row_reader.h"

namespace bitfold {
namespace {

constexpr int64_t kChunkBytes = int64_t{1} << 25;  // of rows that are worked on at a time
constexpr int64_t kBlocks = 8;                     // columns are cut in: (8 + 1) / 2 of 8 are done
constexpr int64_t kLeastBlock = 64;

template <class T>
const LinearAlgebra::Gemm<T>& gemm_of(const LinearAlgebra& algebra) {
  if constexpr (std::is_same_v<T, float>) {
    return algebra.gemm;
  } else {
    return algebra.gemm64;
  }
}

enum class Row : uint8_t { kCounted, kMasked, kNonFinite };

// Some rows at a time, those that count, one after the other.
template <class T>
class Chunk {
 public:
  Chunk(const KernelTable& k, const MatrixView& x, const MatrixView* x_float, const uint8_t* mask,
        const Parallel& parallel)
      : k_(k), x_(x), x_float_(x_float), mask_(mask), parallel_(parallel) {
    const auto row_bytes = static_cast<int64_t>(sizeof(T)) * x.cols;
    most_ = std::clamp<int64_t>(kChunkBytes / row_bytes, 16, std::max<int64_t>(16, x.rows));
    rows_.resize(static_cast<size_t>(most_ * x.cols));
    if (x_float) differences_.resize(rows_.size());
  }

  // Reads from row `begin`; returns the row after the last one looked at.
  int64_t read(int64_t begin, Counts* counts) {
    const int64_t end = std::min(x_.rows, begin + most_);
    std::vector<Row> kinds(static_cast<size_t>(end - begin));
    std::vector<int64_t> place(kinds.size());
    parallel_(end - begin, grain(x_.cols, kGrainWeights), [&](int64_t first, int64_t last) {
      RowReader row(k_, x_), other(k_, x_float_ ? *x_float_ : x_);
      for (int64_t i = first; i < last; ++i) {
        float low, high;
        Row& kind = kinds[static_cast<size_t>(i)];
        kind = mask_ && !mask_[begin + i] ? Row::kMasked
               : !k_.stats(row(begin + i), x_.cols, x_.cols, &low, &high) ||
                       (x_float_ && !k_.stats(other(begin + i), x_.cols, x_.cols, &low, &high))
                   ? Row::kNonFinite
                   : Row::kCounted;
      }
    });
    count_ = 0;
    for (size_t i = 0; i < kinds.size(); ++i) {
      place[i] = count_;
      count_ += kinds[i] == Row::kCounted;
      counts->dropped += kinds[i] == Row::kNonFinite;
    }
    counts->counted += count_;
    parallel_(end - begin, grain(x_.cols, kGrainWeights), [&](int64_t first, int64_t last) {
      RowReader row(k_, x_), other(k_, x_float_ ? *x_float_ : x_);
      for (int64_t i = first; i < last; ++i) {
        if (kinds[static_cast<size_t>(i)] != Row::kCounted) continue;
        const float* from = row(begin + i);
        T* to = rows_.data() + place[static_cast<size_t>(i)] * x_.cols;
        std::copy_n(from, x_.cols, to);
        if (!x_float_) continue;
        const float* target = other(begin + i);
        T* difference = differences_.data() + place[static_cast<size_t>(i)] * x_.cols;
        for (int64_t c = 0; c < x_.cols; ++c) difference[c] = static_cast<T>(target[c]) - to[c];
      }
    });
    return end;
  }

  int64_t count() const { return count_; }
  const T* rows() const { return rows_.data(); }
  const T* differences() const { return differences_.data(); }

 private:
  const KernelTable& k_;
  const MatrixView& x_;
  const MatrixView* x_float_;
  const uint8_t* mask_;
  const Parallel& parallel_;
  int64_t most_ = 0, count_ = 0;
  std::vector<T> rows_, differences_;
};

// multiply(share of the old mean, share of each new row) for every chunk.
template <class T, class Multiply>
Counts each_chunk(Chunk<T>* chunk, int64_t rows, int64_t tokens, const Multiply& multiply) {
  Counts counts;
  for (int64_t at = 0; at < rows;) {
    at = chunk->read(at, &counts);
    if (chunk->count() == 0) continue;
    const double before = static_cast<double>(tokens),
                 now = before + static_cast<double>(chunk->count());
    multiply(static_cast<T>(before / now), static_cast<T>(1.0 / now));
    tokens += chunk->count();
  }
  return counts;
}

}  // namespace

template <class T>
Status update_hessian(const Cpu& cpu, const MatrixView& x, const uint8_t* mask, int64_t tokens,
                      T* hessian, Counts* counts) {
  const int64_t n = x.cols;
  const int64_t block = std::max(kLeastBlock, (n + kBlocks - 1) / kBlocks);
  Chunk<T> chunk(cpu.kernels, x, nullptr, mask, cpu.parallel);
  *counts = each_chunk(&chunk, x.rows, tokens, [&](T old_share, T new_share) {
    for (int64_t low = 0; low < n; low += block) {
      const int64_t high = std::min(n, low + block);
      gemm_of<T>(cpu.algebra)(true, false, high - low, high, chunk.count(), new_share,
                              chunk.rows() + low, n, chunk.rows(), n, old_share, hessian + low * n,
                              n);
    }
  });
  return Status::success();
}

template <class T>
Status finish_hessian(const Cpu& cpu, int64_t n, T* hessian) {
  constexpr int64_t kTile = 32;
  const int64_t tiles = (n + kTile - 1) / kTile;
  cpu.parallel(tiles, grain(n * kTile, kGrainWeights), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t first = t * kTile; first < n; first += kTile) {  // rows to read, tile by tile
        for (int64_t i = t * kTile; i < std::min(n, (t + 1) * kTile); ++i) {
          for (int64_t j = std::max(first, i + 1); j < std::min(n, first + kTile); ++j)
            hessian[i * n + j] = hessian[j * n + i];
        }
      }
    }
  });
  return Status::success();
}

template <class T>
Status update_cross(const Cpu& cpu, const MatrixView& x_float, const MatrixView& x,
                    const uint8_t* mask, int64_t tokens, T* cross, Counts* counts) {
  const int64_t n = x.cols;
  Chunk<T> chunk(cpu.kernels, x, &x_float, mask, cpu.parallel);
  *counts = each_chunk(&chunk, x.rows, tokens, [&](T old_share, T new_share) {
    gemm_of<T>(cpu.algebra)(true, false, n, n, chunk.count(), new_share, chunk.differences(), n,
                            chunk.rows(), n, old_share, cross, n);
  });
  return Status::success();
}

#define BITFOLD_INSTANTIATE(T)                                                                  \
  template Status update_hessian<T>(const Cpu&, const MatrixView&, const uint8_t*, int64_t, T*, \
                                    Counts*);                                                   \
  template Status finish_hessian<T>(const Cpu&, int64_t, T*);                                   \
  template Status update_cross<T>(const Cpu&, const MatrixView&, const MatrixView&,             \
                                  const uint8_t*, int64_t, T*, Counts*);
BITFOLD_INSTANTIATE(float)
BITFOLD_INSTANTIATE(double)
#undef BITFOLD_INSTANTIATE

}  // namespace bitfold
