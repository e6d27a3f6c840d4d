// A view of buffers that the host cannot read, those of a GPU.
#pragma once

#include "core/view.h"

namespace bitfold {

// Single values that a PackedView holds by value, as addresses: null where the format has none.
struct ValueAddresses {
  const float* scale_offset;
  const int8_t* exponent;          // of factor
  const int8_t* outlier_exponent;  // of outliers.factor
};

// As make_view, but nothing is dereferenced: scale_offset, factor and outliers.factor are left as
// 0, 1 and 1 for whoever can read `addresses`.
PackedView make_unread_view(const Format& format, int64_t rows, int64_t cols,
                            const void* const* buffers, ValueAddresses* addresses);

}  // namespace bitfold
