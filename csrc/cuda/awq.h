// AWQ's two searches on a GPU, kernel by kernel (solvers/awq.h, which solvers/cuda/ leads through).
#pragma once

#include "core/view.h"
#include "cuda/rounding.h"

namespace bitfold::cuda {

// ---- clipping: candidates for the scales of one group in some rows

inline constexpr int kClips = 9;  // from 0.95 to 0.55 of the largest magnitude
inline constexpr int kClipCandidates = 1 + kClips;

struct ClipGroup {
  int64_t group, first_row, rows;
  float *scale, *zero;  // [kClipCandidates, rows]
  double* loss;         // [kClipCandidates, rows]
};
// The scales of the matrix and those of clipped ranges, as they are stored; losses 0.
Status propose_clips(const RoundingMatrix& w, const DeviceEncoding& encoding,
                     const StoredRounding& rounding, const int8_t* exponent, const ClipGroup& group,
                     cudaStream_t stream);
// errors [columns, kClipCandidates, rows] of the columns from `low` on.
Status round_clips(const RoundingMatrix& w, const DeviceEncoding& encoding, const ClipGroup& group,
                   int64_t low, int64_t columns, float* errors, cudaStream_t stream);
// losses += errors times products, both so laid out.
Status add_clip_losses(const ClipGroup& group, int64_t columns, const float* errors,
                       const float* products, cudaStream_t stream);
// Sums over the groups of a row.
struct ClipSums {
  double clipped, before, after;
};
// The best candidates become the scales of the matrix; sums [w.rows] grow.
Status take_clips(const RoundingMatrix& w, const ClipGroup& group, ClipSums* sums,
                  cudaStream_t stream);

// ---- scaling

// shares [w.cols]: sum over rows of |w| / max |w| of its group. partial [share_blocks(rows), cols]
// is scratch.
inline constexpr int64_t kShareRows = 64;
BITFOLD_HOST_DEVICE inline int64_t share_blocks(int64_t rows) {
  return (rows + kShareRows - 1) / kShareRows;
}
Status sum_shares(const MatrixView& w, int64_t group_size, float* partial, double* shares,
                  cudaStream_t stream);
// out [count, w.cols] = rows i (w.rows - 1) / max(1, count - 1) of w.
Status pick_rows(const MatrixView& w, int64_t count, float* out, cudaStream_t stream);
// out = in times by[channel[col]], 1 where that is -1; [rows, cols].
Status scale_columns(const float* in, int64_t rows, int64_t cols, const int64_t* channel,
                     const float* by, float* out, cudaStream_t stream);
// errors = errors / by[channel[col]] - weight.
Status unscale_errors(const float* weight, int64_t rows, int64_t cols, const int64_t* channel,
                      const float* by, float* errors, cudaStream_t stream);
// sums [rows] += a row of errors, `cols` apart, times one of products [rows, width].
Status add_dots(const float* errors, int64_t rows, int64_t cols, const float* products,
                int64_t width, double* sums, cudaStream_t stream);

}  // namespace bitfold::cuda
