// Room for a packed weight on the way to something else.
#pragma once

#include <memory>
#include <vector>

#include "core/format.h"
#include "core/view.h"

namespace bitfold {

// Buffers of a format that nobody keeps.
class ScratchBuffers {
 public:
  ScratchBuffers(const Format& format, int64_t rows, int64_t cols) {
    for (const BufferSpec& spec : format.buffers(rows, cols)) {
      // As int32, so that all of them are aligned.
      storage_.emplace_back(new int32_t[static_cast<size_t>(spec.nbytes() + 3) / 4]);
      pointers_.push_back(storage_.back().get());
    }
  }
  void* const* data() const { return pointers_.data(); }
  PackedView view(const Format& format, int64_t rows, int64_t cols) const {
    const std::vector<const void*> read(pointers_.begin(), pointers_.end());
    return make_view(format, rows, cols, read.data());
  }

 private:
  std::vector<std::unique_ptr<int32_t[]>> storage_;
  std::vector<void*> pointers_;
};

}  // namespace bitfold
