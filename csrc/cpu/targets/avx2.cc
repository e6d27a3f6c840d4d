// The kernels compiled for one instruction set: nothing of the standard library's templates may be
// instantiated here, and every function stays in this namespace, or the linker might hand a wide
// copy to an older CPU.
#include "cpu/kernel_table.h"

#include <immintrin.h>

#include <cstring>

namespace bitfold::avx2 {

// Order matters: names first, bodies in terms of them, then the table of the bodies.
#include "cpu/vec/avx2.h"
#include "cpu/vec/x86.h"
#include "cpu/vec/avx2_dot.h"

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

}  // namespace bitfold::avx2
