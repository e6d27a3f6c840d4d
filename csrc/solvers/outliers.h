// Which weights get a sparse fp16 value of their own (format option `outliers`), and those values.
// The idea is SpQR's (arXiv 2306.03078): few weights make groups lose most, and scales that need
// not reach them serve the others better.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// mask [rows, cols] = 1 for the format.outlier_count(rows, cols) weights with the largest
// importance[col] * (w - q)^2, else 0; q is what the dense format would store if its scales were
// chosen without the outliers. `importance` [cols] is 1 where null; SpQR's sensitivity takes
// 1 / [H^-1]_jj. Same mask on every CPU and for every number of threads; of equal ones the first
// are taken. Fails where `quantize` does.
Status choose_outliers(const KernelTable& k, const Format& format, Method method,
                       const MatrixView& w, const float* importance, uint8_t* mask,
                       const Parallel& parallel);

// out [rows, cols] = w, but for outliers beyond the range of the other weights of their group:
// those are moved to its end, so that they have no say in the choice of a scale.
void set_aside(const KernelTable& k, const Format& format, const MatrixView& w, const uint8_t* mask,
               float* out, const Parallel& parallel);

// Fills the buffers of outliers, which are the last of `buffers`, with w minus what the codes in
// the first ones stand for. Fails unless mask holds as many ones as the format has outliers.
Status fill_outliers(const KernelTable& k, const Format& format, const MatrixView& w,
                     const uint8_t* mask, void* const* buffers, const Parallel& parallel);

// `quantize` for formats with outliers.
Status quantize_with_outliers(const KernelTable& k, const Format& format, Method method,
                              const MatrixView& w, void* const* buffers, const Parallel& parallel);

}  // namespace bitfold
