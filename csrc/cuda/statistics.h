// Means of products of activations on a GPU, and what solvers look at in them. A mean is [n, n],
// contiguous, float or double.
#pragma once

#include "core/view.h"
#include "cuda/stream.h"

namespace bitfold::cuda {

struct MeanView {
  const void* data;
  bool fp64;
  int64_t n;
};

// ---- what a solver begins with

inline constexpr unsigned long long kNone = ~0ull;
// *first, which is kNone or what an earlier search found, becomes row * cols + col of the first NaN
// or infinity.
Status find_non_finite(const MatrixView& w, unsigned long long* first, cudaStream_t stream);
Status find_non_finite(const MeanView& mean, unsigned long long* first, cudaStream_t stream);

// diagonal [n].
Status read_diagonal(const MeanView& mean, double* diagonal, cudaStream_t stream);
// out [n, n], float or double: rows and columns of the mean in the order of `column`; `added` to
// the diagonal, which is 1 for dead columns.
Status arrange(const MeanView& mean, const int32_t* column, const uint8_t* dead, double added,
               bool out_fp64, void* out, cudaStream_t stream);
Status narrow(const double* from, int64_t n, float* to, cudaStream_t stream);
Status widen(const float* from, int64_t n, double* to, cudaStream_t stream);

// ---- means

enum class RowKind : uint8_t { kCounted, kMasked, kNonFinite };
struct RowCounts {
  unsigned long long counted, non_finite;
};
// kinds [x.rows]; counts, which must be zero, grow. mask [x.rows] or null; target null or of the
// shape of x: such a row must be finite in both.
Status look_at_rows(const MatrixView& x, const MatrixView* target, const uint8_t* mask,
                    uint8_t* kinds, RowCounts* counts, cudaStream_t stream);
// out [count, x.cols]: rows of x from `first` on, or, with a target, that less x; those that do not
// count as zeros.
Status copy_rows(const MatrixView& x, const MatrixView* target, const uint8_t* kinds, int64_t first,
                 int64_t count, bool out_fp64, void* out, cudaStream_t stream);
// Copies the lower triangle to the upper one.
Status mirror(const MeanView& mean, cudaStream_t stream);

}  // namespace bitfold::cuda
