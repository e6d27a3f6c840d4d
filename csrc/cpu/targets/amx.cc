// The kernels compiled for one instruction set: nothing of the standard library's templates may be
// instantiated here, and every function stays in this namespace, or the linker might hand a wide
// copy to an older CPU.
#include "cpu/kernel_table.h"

#include <immintrin.h>

#include <cstring>

namespace bitfold::amx {

// Order matters: names first, then bodies in terms of them.
#include "cpu/vec/avx512.h"

#include "cpu/vec/x86.h"

#include "cpu/vec/avx512_dot.h"

#include "cpu/kernels/bfloat16-inl.h"

}  // namespace bitfold::amx
