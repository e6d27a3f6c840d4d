// The kernels in plain C++ with the baseline flags: what runs on any 64-bit CPU.
#include <cstring>

#include "core/float16.h"
#include "cpu/kernel_table.h"

namespace bitfold::portable {

// Order matters: names first, bodies in terms of them, then the table of the bodies.
#include "cpu/vec/portable.h"
#include "cpu/vec/portable_dot.h"

#include "cpu/kernels/parameters-inl.h"

#include "cpu/kernels/decode-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/quantize-inl.h"
#include "cpu/kernels/search-inl.h"

#include "cpu/kernels/activations-inl.h"
#include "cpu/kernels/codecs-inl.h"
#include "cpu/kernels/units-inl.h"

#include "cpu/kernels/panels-inl.h"
#include "cpu/kernels/rows-inl.h"

#include "cpu/kernels/table-inl.h"

}  // namespace bitfold::portable
