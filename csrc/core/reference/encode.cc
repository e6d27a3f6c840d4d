#include <algorithm>
#include <cmath>

#include "core/reference/reference.h"

namespace bitfold::reference {

void encode_grid(const float* w, int64_t n, float inverse_scale, float zero, float top,
                 uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    const float code = std::nearbyintf(w[i] * inverse_scale + zero);
    codes[i] = static_cast<uint8_t>(std::min(std::max(code, 0.0f), top));
  }
}

void encode_codebook(const float* w, int64_t n, float inverse_scale, const Codebook& book,
                     uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = w[i] * inverse_scale;
    int rank = 0;
    for (int p = 0; p < book.pivot_count; ++p) rank += scaled > book.pivots[p];
    codes[i] = book.code_of_rank[rank];
  }
}

}  // namespace bitfold::reference
