// Memory of one call or thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace bitfold {

// Uninitialized memory that begins with a page: where activations, sums and the stream meet in the
// first cache is then the same in every call (measured: else up to half as slow again).
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), kPage))) {}
  ~Scratch() { ::operator delete(data_, kPage); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint8_t* data() const { return data_; }

 private:
  static constexpr std::align_val_t kPage{4096};
  uint8_t* data_;
};

}  // namespace bitfold
