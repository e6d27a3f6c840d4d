// Torch's BLAS and LAPACK on the CPU, for solvers that know no torch.
#pragma once

#include "solvers/linear_algebra.h"

namespace bitfold::binding {

const LinearAlgebra& torch_linear_algebra();

}  // namespace bitfold::binding
