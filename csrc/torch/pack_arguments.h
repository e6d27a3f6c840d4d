// What packing of codes and of scales is given, checked the same way on the CPU and on a GPU.
#pragma once

#include "torch/checks.h"

namespace bitfold::binding {

struct CodeSizes {
  int64_t rows, cols;
  int bits;
  int64_t row_bytes;  // of packed codes; 0 where there are none
  bool empty() const { return rows == 0 || cols == 0; }
};
// codes [rows, cols], a byte each.
CodeSizes sizes_to_pack(const Tensor& codes, int64_t bits, const char* op,
                        const Place& place = kCpu);
// packed [rows * row_bytes].
CodeSizes sizes_to_unpack(const Tensor& packed, int64_t bits, int64_t rows, int64_t cols,
                          const char* op, const Place& place = kCpu);

// Scales [any shape] as a byte each, with a float32 (whose bits lie in int32) per block and one
// for all.
struct CodedScales {
  Tensor codes, absmax, offset;
};
CodedScales empty_coded_scales(const Tensor& scales, const char* op, const Place& place = kCpu);
// Fails where they do not fit each other; returns the scales yet to be written.
Tensor empty_scales(const CodedScales& coded, const char* op, const Place& place = kCpu);

}  // namespace bitfold::binding
