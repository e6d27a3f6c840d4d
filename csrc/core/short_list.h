// A handful of values without a heap allocation: every op call describes its buffers anew, and for
// a small layer allocations would cost more than the product.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
#include <initializer_list>

namespace bitfold {

// At most N values of a plain type, in the order in which they were added.
template <class T, size_t N>
class ShortList {
 public:
  ShortList() = default;
  ShortList(std::initializer_list<T> values) : size_(values.size()) {
    assert(values.size() <= N);
    std::copy(values.begin(), values.end(), values_.begin());
  }
  void push_back(const T& value) {
    assert(size_ < N);
    values_[size_++] = value;
  }

  size_t size() const { return size_; }
  const T* data() const { return values_.data(); }
  const T* begin() const { return values_.data(); }
  const T* end() const { return values_.data() + size_; }
  const T& operator[](size_t i) const { return values_[i]; }

 private:
  std::array<T, N> values_;
  size_t size_ = 0;
};

}  // namespace bitfold
