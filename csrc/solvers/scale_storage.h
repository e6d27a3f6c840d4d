// The buffers of a Format being filled: scales, zero points and learned levels into their stored
// form, and back into what a reader will decode, which is what codes are chosen for.
#pragma once

#include <array>
#include <vector>

#include "core/bitpack.h"
#include "core/parallel.h"
#include "cpu/kernel_table.h"

namespace bitfold {

inline Encoding encoding_of(const Format& format) {
  return {format.bits(), format.family() == Family::kInteger ? format.zero : Zero::kNone,
          format.element().codebook};
}

class ScaleStorage {
 public:
  // `buffers` in the order of Format::buffers(rows, cols).
  ScaleStorage(const KernelTable& k, const Format& format, int64_t rows, int64_t cols,
               void* const* buffers, const Parallel& parallel);

  template <class T>
  T* buffer(BufferRole role) const {
    return static_cast<T*>(buffer_[static_cast<size_t>(role)]);
  }
  uint8_t* codes_of(int64_t r) const {
    return buffer<uint8_t>(BufferRole::kCodes) + r * packed_row_bytes(cols_, format_.bits());
  }
  int64_t groups() const { return groups_; }  // of a row
  int64_t first_scale(int64_t r) const {
    return format_.grouping == Grouping::kTensor ? 0 : r * groups_;
  }
  // Scales as fp16, times one power of two for the tensor.
  bool stores_halves() const {
    return format_.family() == Family::kInteger && !format_.double_quant;
  }

  void store_exponent(int exponent);
  // Writes scales [scale rows, groups] (with the power of two `exponent` where they are fp16) and,
  // if `replace`, makes them and the real zero points that go with them what a reader decodes.
  void store_scales(int exponent, std::vector<float>* scales, std::vector<float>* zeros,
                    bool replace = true);
  // Writes the zero points [groups] of a row, which become what a reader decodes.
  void store_zeros(int64_t r, float* zeros);
  // Writes learned levels [scale rows, 2^bits], which become what a reader decodes.
  void store_books(std::vector<float>* books);

  // What all buffers but the codes hold, to return to.
  std::vector<std::vector<uint8_t>> save() const;
  void restore(const std::vector<std::vector<uint8_t>>& saved);

  // Some scales and zero points as a reader would decode them, where that hangs on nothing else:
  // all but double quantization. Magnitudes beyond fp16 become its largest.
  void round(int exponent, int64_t n, float* scale, float* zero) const;

 private:
  void follow_scales(const std::vector<float>& wanted, const std::vector<float>& scales,
                     std::vector<float>* zeros) const;

  const KernelTable& k_;
  const Format& format_;
  const int64_t rows_, cols_, groups_;
  const Parallel& parallel_;
  std::array<void*, 7> buffer_{};
};

}  // namespace bitfold
