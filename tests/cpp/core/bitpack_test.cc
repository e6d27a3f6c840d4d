#include "core/bitpack.h"

#include "support.h"

namespace bitfold {
namespace {

std::vector<uint8_t> random_codes(int64_t n, int bits, unsigned seed) {
  std::mt19937 rng(seed);
  std::vector<uint8_t> codes(static_cast<size_t>(n));
  for (uint8_t& code : codes) code = static_cast<uint8_t>(rng() & ((1u << bits) - 1));
  return codes;
}

std::vector<uint8_t> packed(const std::vector<uint8_t>& codes, int bits) {
  const auto cols = static_cast<int64_t>(codes.size());
  std::vector<uint8_t> row(static_cast<size_t>(packed_row_bytes(cols, bits)), 0xa5);
  pack_row(codes.data(), cols, bits, row.data());
  return row;
}

TEST(Bitpack, KnownBytes) {
  const std::vector<uint8_t> codes = {1, 2, 3, 0, 1};
  EXPECT_EQ(packed(codes, 8), codes);
  EXPECT_EQ(packed(codes, 4), (std::vector<uint8_t>{0x12, 0x30, 0x10}));
  EXPECT_EQ(packed(codes, 2), (std::vector<uint8_t>{0b01101100, 0b01000000}));
  const std::vector<uint8_t> three = {1, 2, 3, 4, 5, 6, 7, 0, 4};
  EXPECT_EQ(packed(three, 3),
            (std::vector<uint8_t>{0b01101100, 0b01101100, 0b00000000, 0b00011110, 0b10000000}));
}

TEST(Bitpack, EveryLengthComesBackByBothReaders) {
  for (int bits : {2, 3, 4, 8}) {
    for (int64_t cols = 1; cols <= 70; ++cols) {
      const std::vector<uint8_t> codes = random_codes(cols, bits, static_cast<unsigned>(cols));
      const std::vector<uint8_t> row = packed(codes, bits);
      std::vector<uint8_t> back(codes.size(), 0xff);
      unpack_row(row.data(), cols, bits, back.data());
      EXPECT_EQ(back, codes) << bits << " bits, " << cols;
      for (int64_t i = 0; i < cols; ++i)
        EXPECT_EQ(extract_code(row.data(), cols, bits, i), codes[static_cast<size_t>(i)]);
    }
  }
}

TEST(Bitpack, PaddingBitsAreZeroAndHighBitsOfCodesAreIgnored) {
  for (int bits : {2, 3, 4}) {
    for (int64_t cols = 1; cols <= 33; ++cols) {
      const std::vector<uint8_t> wild(static_cast<size_t>(cols), 0xff);
      const std::vector<uint8_t> tame(static_cast<size_t>(cols),
                                      static_cast<uint8_t>((1 << bits) - 1));
      EXPECT_EQ(packed(wild, bits), packed(tame, bits));
      int set = 0;
      for (uint8_t byte : packed(wild, bits)) set += __builtin_popcount(byte);
      EXPECT_EQ(set, cols * bits) << "padding must stay zero";
    }
  }
}

TEST(Bitpack, RowBytes) {
  EXPECT_EQ(packed_row_bytes(197, 8), 197);
  EXPECT_EQ(packed_row_bytes(197, 4), 99);
  EXPECT_EQ(packed_row_bytes(197, 3), 75);
  EXPECT_EQ(packed_row_bytes(197, 2), 50);
  EXPECT_EQ(packed_row_bytes(0, 3), 0);
  EXPECT_EQ(packed_row_bytes(int64_t{1} << 33, 4), int64_t{1} << 32);
  EXPECT_EQ(packed_row_bytes(197, 5), 0) << "no such width";
}

}  // namespace
}  // namespace bitfold
