#include "core/bitpack.h"

#include <cstring>

namespace bitfold {
namespace {

// bits in {4, 2, 1}: 8 / bits codes to a byte, first in the high bits; only the masked bits of each
// code are taken.
template <int Bits>
void pack_plane(const uint8_t* codes, int64_t cols, int shift, uint8_t* out) {
  constexpr int kPerByte = 8 / Bits;
  constexpr unsigned kMask = (1u << Bits) - 1;
  const int64_t whole = cols / kPerByte;
  for (int64_t b = 0; b < whole; ++b) {
    unsigned byte = 0;
    for (int j = 0; j < kPerByte; ++j)
      byte = byte << Bits | ((codes[b * kPerByte + j] >> shift) & kMask);
    out[b] = static_cast<uint8_t>(byte);
  }
  if (whole * kPerByte == cols) return;
  unsigned byte = 0;
  for (int64_t i = whole * kPerByte; i < (whole + 1) * kPerByte; ++i) {
    byte = byte << Bits | (i < cols ? (codes[i] >> shift) & kMask : 0u);
  }
  out[whole] = static_cast<uint8_t>(byte);
}

}  // namespace

void pack_row(const uint8_t* codes, int64_t cols, int bits, uint8_t* row) {
  switch (bits) {
    case 8:
      memcpy(row, codes, static_cast<size_t>(cols));
      break;
    case 4:
      pack_plane<4>(codes, cols, 0, row);
      break;
    case 2:
      pack_plane<2>(codes, cols, 0, row);
      break;
    case 3:
      pack_plane<2>(codes, cols, 0, row);
      pack_plane<1>(codes, cols, 2, row + (cols + 3) / 4);
      break;
    default:
      break;
  }
}

void unpack_row(const uint8_t* row, int64_t cols, int bits, uint8_t* codes) {
  for (int64_t i = 0; i < cols; ++i)
    codes[i] = static_cast<uint8_t>(extract_code(row, cols, bits, i));
}

}  // namespace bitfold
