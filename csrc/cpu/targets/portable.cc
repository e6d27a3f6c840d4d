// The kernels in plain C++ with the baseline flags: what runs on any 64-bit CPU.
#include <cstring>

#include "core/float16.h"
#include "cpu/kernel_table.h"

namespace bitfold::portable {

// Order matters: names first, then bodies in terms of them.
#include "cpu/vec/portable.h"
#include "cpu/vec/portable_dot.h"

#include "cpu/vec/plain_dot.h"

#include "cpu/kernels/all-inl.h"

}  // namespace bitfold::portable
