// Codes in bytes. Every row starts on a byte; the first element sits in the high bits.
//   8 bits: a byte each.   4 bits: |e0 e1|   2 bits: |e0 e1 e2 e3|
//   3 bits: per row a plane of the low two bits (as 2-bit codes), then one of the high bit
//   |e0 … e7|.
// Padding bits at a row's end are zero.
#pragma once

#include <cstdint>

#include "core/float16.h"

namespace bitfold {

BITFOLD_HOST_DEVICE constexpr int64_t packed_row_bytes(int64_t cols, int bits) {
  switch (bits) {
    case 8:
      return cols;
    case 4:
      return (cols + 1) / 2;
    case 3:
      return (cols + 3) / 4 + (cols + 7) / 8;
    case 2:
      return (cols + 3) / 4;
    default:
      return 0;
  }
}

BITFOLD_HOST_DEVICE inline unsigned extract_code(const uint8_t* row, int64_t cols, int bits,
                                                 int64_t i) {
  switch (bits) {
    case 8:
      return row[i];
    case 4:
      return (row[i / 2] >> (i % 2 ? 0 : 4)) & 15u;
    case 2:
      return (row[i / 4] >> (6 - 2 * (i % 4))) & 3u;
    case 3: {
      const unsigned low = (row[i / 4] >> (6 - 2 * (i % 4))) & 3u;
      const unsigned high = (row[(cols + 3) / 4 + i / 8] >> (7 - i % 8)) & 1u;
      return high << 2 | low;
    }
    default:
      return 0;
  }
}

// codes [cols], one per byte, to one packed row.
void pack_row(const uint8_t* codes, int64_t cols, int bits, uint8_t* row);
void unpack_row(const uint8_t* row, int64_t cols, int bits, uint8_t* codes);

}  // namespace bitfold
