#include "cuda/weight.h"

#include <algorithm>

namespace bitfold::cuda {

DeviceWeight make_device_weight(const Format& format, int64_t rows, int64_t cols,
                                const void* const* buffers) {
  DeviceWeight w{};
  w.view = make_unread_view(format, rows, cols, buffers, &w.addresses);
  if (w.view.levels) std::copy_n(w.view.levels, 1 << w.view.bits, w.levels);
  w.view.levels = nullptr;  // the host's memory
  return w;
}

}  // namespace bitfold::cuda
