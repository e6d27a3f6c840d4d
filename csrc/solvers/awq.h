// AWQ (Lin et al., 2306.00978): a scale per input channel that moves what rounding costs away from
// channels with large inputs, and ranges of groups clipped where that pays. Both are searched on a
// small grid and judged by what they leave of the products, tr(E H E^T): E is the error of the
// weights, H the mean of x x^T.
#pragma once

#include <vector>

#include "core/view.h"
#include "solvers/cpu.h"

namespace bitfold {

// A matrix whose columns a scale multiplies.
struct AwqReader {
  Format format;
  Method method;
  MatrixView weight;       // [rows, cols]
  const float* hessian;    // [cols, cols], both halves filled
  const int64_t* channel;  // [cols] whose scale a column gets; -1: none
  const float* magnitude;  // [cols] mean |x|
  int64_t tokens;          // that H is the mean of
};

struct AwqScale {
  bool better = false;               // than a scale of 1, which is what is returned otherwise
  double alpha = 0.0;                // the power that was taken
  bool by_weight = false;            // whether weights had a say, below
  double before = 0.0, after = 0.0;  // tokens * loss of all readers; from the rows that were judged
};

// scale [channels] = x^a or x^a / w^(1 - a), a = 0, 0.05 .. 0.95, divided by the geometric mean of
// its extremes: the one with which rounding the readers costs least. x is the mean |input| of a
// channel, w its mean |weight| as a share of the largest of the group. Of large matrices rows
// evenly apart are judged, 2^31 multiplications for each candidate but at least 64. The same
// products mean the same scale on every instruction set and for every number of threads.
Status awq_scale(const Cpu& cpu, const std::vector<AwqReader>& readers, int64_t channels,
                 float* scale, AwqScale* found);

struct AwqClip {
  int64_t groups = 0, clipped = 0;  // of rows; whose range was cut
  double before = 0.0,
         after = 0.0;  // sum of e H e over rows and groups, columns of others left out
};

// Fills `buffers` (as quantize()) with the codes of scales that are chosen group by group: the one
// of `method`, or that of the range cut off at 0.95 .. 0.55 of the largest magnitude, whichever
// leaves the least e H e over the columns of the group, in tiles of at most 512 columns. Those not
// 0 in exact [rows, cols] (may be null) are stored elsewhere, without an error. Formats with scales
// of groups or rows and without outliers.
Status awq_clip(const Cpu& cpu, const Format& format, Method method, const MatrixView& w,
                const float* hessian, const uint8_t* exact, void* const* buffers, AwqClip* found);

}  // namespace bitfold
