// A matrix whose codes are chosen column by column on a GPU: its layout, and the kernels that the
// solvers (solvers/cuda/) lead through. Rows lie side by side, so that threads, a row each, read
// neighbours.
#pragma once

#include "core/view.h"
#include "cuda/encode.h"
#include "cuda/quantize.h"
#include "cuda/stream.h"
#include "cuda/weight.h"

namespace bitfold::cuda {

struct RoundingMatrix {
  int64_t rows, cols;
  int64_t groups, group_size;  // of a row
  int64_t stride;              // between columns, and between groups
  float* weights;              // [cols, rows]
  const uint8_t* exact;        // [cols, rows] or null: not 0 where a weight is stored elsewhere
  float* scale;                // [groups, rows] as a reader decodes them
  float* zero;                 // [groups, rows]
  uint8_t* codes;              // [cols, rows]
};

// What belongs to the order of columns (solvers/factor.h): positions count backwards.
struct ColumnPlaces {
  const int32_t* column;    // [cols] by position
  const int32_t* position;  // [cols] by column
  const uint8_t* dead;      // [cols] by column: inputs that are always zero
};

// ---- rounding.cu: into that layout and out of it

// Columns of `dead` as zeros.
Status lay_out_weights(const MatrixView& w, const uint8_t* dead, const RoundingMatrix& to,
                       cudaStream_t stream);
// exact [rows, cols] to [cols, rows] at to_stride.
Status lay_out_exact(const uint8_t* exact, int64_t rows, int64_t cols, int64_t to_stride,
                     uint8_t* to, cudaStream_t stream);
// Scales or zero points [spans.rows, groups] to [groups, rows], and back.
Status spread_spans(const Spans& spans, const float* from, const RoundingMatrix& w, float* to,
                    cudaStream_t stream);
Status collect_spans(const Spans& spans, const float* from, const RoundingMatrix& w, float* to,
                     cudaStream_t stream);
// Codes, scales and zero points of a packed weight.
Status read_packed(const DeviceWeight& from, const RoundingMatrix& to, cudaStream_t stream);
Status pack_columns(const RoundingMatrix& w, int bits, uint8_t* packed, cudaStream_t stream);

// Rounds some rows as they are, without feedback: errors [cols, count] of rows[count], and, where
// rows is null, those of all rows and their codes.
Status round_plainly(const RoundingMatrix& w, const DeviceEncoding& encoding, const int32_t* rows,
                     int64_t count, float* errors, cudaStream_t stream);
// The errors of some rows, kept by position, to [cols, count] by column.
Status pick_errors(const RoundingMatrix& w, const ColumnPlaces& places, const float* error,
                   const int32_t* rows, int64_t count, float* errors, cudaStream_t stream);

// The errors of the codes that are there, by position.
Status decode_errors(const RoundingMatrix& w, const DeviceEncoding& encoding,
                     const ColumnPlaces& places, float* error, cudaStream_t stream);

// to[a] = from[column[a]] for all rows; to[column[a]] += from[a] but for dead columns.
Status gather_columns(const RoundingMatrix& w, const ColumnPlaces& places, const float* from,
                      float* to, cudaStream_t stream);
Status add_columns(const RoundingMatrix& w, const ColumnPlaces& places, const float* from,
                   float* to, cudaStream_t stream);

// ---- feedback.cu: as cpu/kernel_table.h's feed_back, for all rows

inline constexpr int kBlockColumns = 128;  // that one launch rounds, at most

struct FeedbackBlock {
  const float* matrix;  // [cols, cols] by position: the factor of the Hessian, or, `again`, itself
  int64_t high;         // positions [high - count, high) are rounded, the last first
  int count;
  bool again;               // errors and codes hold an earlier choice, which yields to a better one
  const float* correction;  // row of position high - 1, the others before it, at the stride of the
                            // matrix: sums over finished columns
  float* error;             // [cols, rows] by position: w - decoded
  float* change;            // as correction; of the error, where `again`
  double* loss;             // [rows] grows by (the change of) the sum of squares
};

Status feed_back(const RoundingMatrix& w, const DeviceEncoding& encoding,
                 const ColumnPlaces& places, const FeedbackBlock& block, cudaStream_t stream);

// values [columns of the group in their order, rows]: what they are to be rounded from. correction:
// row of position `low`; the group has positions [low, high).
Status begin_group(const RoundingMatrix& w, const ColumnPlaces& places, const float* matrix,
                   int64_t low, int64_t high, const float* correction, float* values,
                   cudaStream_t stream);

// ---- losses.cu

// sums [cols] by position: of the squares of an error over rows, 0 for dead inputs.
Status sum_squares(const RoundingMatrix& w, const ColumnPlaces& places, const float* error,
                   double* sums, cudaStream_t stream);

// loss [rows] grows by error times products [count, rows] over the positions from `low` on, dead
// inputs left out.
Status add_losses(const RoundingMatrix& w, const ColumnPlaces& places, int64_t low, int64_t count,
                  const float* error, const float* products, double* loss, cudaStream_t stream);

// Sums over the columns of one row, dead inputs left out: e (H e), e^2 R_kk^2 and e^2.
struct RowLoss {
  double loss, predicted, squares;
};
// errors and products [cols, count]; products float, or double where `fp64`; own: R_kk by position.
Status sum_losses(int64_t cols, int64_t count, const ColumnPlaces& places, const float* errors,
                  const void* products, bool fp64, const double* own, RowLoss* sums,
                  cudaStream_t stream);

}  // namespace bitfold::cuda
