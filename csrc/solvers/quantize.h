// A float matrix into the buffers of a Format.
#pragma once

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold {

// Fills `buffers` (allocated, in the order and sizes of Format::buffers(w.rows, w.cols)). Same bits
// on every instruction set and for every number of threads. Fails on NaN and infinity, naming the
// place; the buffers are then unspecified.
Status quantize(const KernelTable& k, const Format& format, Method method, const MatrixView& w,
                void* const* buffers, const Parallel& parallel);

}  // namespace bitfold
