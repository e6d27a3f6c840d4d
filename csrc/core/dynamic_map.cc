#include "core/codebook.h"

namespace bitfold {

// For i in 0..6: the midpoints of 2^i + 1 equidistant points on [0.1, 1], times 10^(i-6), with both
// signs; then 0 and 1. Computed in float32 as the format's first implementation does, hence kept as
// data: a float64 formula differs in 72 last digits.
const float kDynamicMap[256] = {
#include "core/dynamic_map.inc"
};

}  // namespace bitfold
