// A packed weight whose buffers lie in the memory of a GPU: what a kernel takes, by value.
#pragma once

#include <cstdint>

#include "core/codebook.h"
#include "core/unread_view.h"

namespace bitfold::cuda {

struct DeviceWeight {
  PackedView view;           // factor, scale_offset, outliers.factor and levels are not to be used
  ValueAddresses addresses;  // what kernels read instead, once per thread: decode.h, Values
  float levels[kMaxLevels];  // by code, fixed codebooks: they travel with the launch
};

// Reads nothing of `buffers`, which lie in the order of Format::buffers.
DeviceWeight make_device_weight(const Format& format, int64_t rows, int64_t cols,
                                const void* const* buffers);

}  // namespace bitfold::cuda
