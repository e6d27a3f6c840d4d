// Which byte, bank and code goes to which lane.
#include "cuda/mma_maps.h"

#include <set>

#include "support.h"

namespace bitfold::cuda {
namespace {

// Lanes that one pass of shared memory serves together must find their bytes in different banks, or
// the same word.
template <class Address>
int worst_conflict(int bytes, Address address) {
  int worst = 0;
  const int together = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += together) {
    std::set<int> words[32];
    for (int lane = first; lane < first + together; ++lane)
      for (int at = address(lane); at < address(lane) + bytes; at += 4)
        words[at / 4 % 32].insert(at / 4);
    for (const auto& bank : words) worst = std::max(worst, static_cast<int>(bank.size()));
  }
  return worst;
}

template <int kBits>
void check_chunk() {
  SCOPED_TRACE(std::to_string(kBits) + " bits");
  using C = Chunk<kBits>;
  std::set<int> targets;
  std::set<std::pair<int, int>> sources;
  for (int i = 0; i < C::kCopies; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      const Copy copy = copy_of<kBits>(i, lane);
      EXPECT_EQ(copy.target % 16, 0);
      EXPECT_LE(copy.target + 16, C::kBytes);
      EXPECT_LE(copy.source + 16, copy.high ? C::kHighBytes : C::kRowBytes);
      targets.insert(copy.target);
      sources.insert({copy.row * 2 + copy.high, copy.source});
      // What Ring takes for granted: a lane's place within a row is the same in all its copies.
      EXPECT_EQ(copy.source, copy_of<kBits>(copy.high ? C::kCopies - 1 : 0, lane).source);
    }
  }
  EXPECT_EQ(targets.size() * 16, static_cast<size_t>(C::kBytes));
  EXPECT_EQ(sources.size(), targets.size());

  constexpr int kLane = C::kRowBytes / C::kSegments / 4;
  for (int segment = 0; segment < C::kSegments; ++segment) {
    for (int below : {0, 8}) {
      EXPECT_EQ(worst_conflict(kLane,
                               [&](int lane) {
                                 const Lane at = lane_of(lane);
                                 return place_of<kBits>(at.row + below,
                                                        (segment * 4 + at.quarter) * kLane);
                               }),
                1);
    }
  }
}

TEST(MmaMaps, ChunksAreCopiedOnceAndReadWithoutConflicts) {
  check_chunk<2>();
  check_chunk<3>();
  check_chunk<4>();
  check_chunk<8>();
  for (int segment = 0; segment < Chunk<3>::kSegments; ++segment) {
    EXPECT_EQ(worst_conflict(2,
                             [&](int lane) {
                               const Lane at = lane_of(lane);
                               return swizzled<32>(at.row, (segment * 4 + at.quarter) * 2);
                             }),
              1);
  }
}

// Sixteen codes through memory as format.md has them, a lane's word, and the table.
template <int kBits>
void check_pairs() {
  SCOPED_TRACE(std::to_string(kBits) + " bits");
  using C = Chunk<kBits>;
  uint8_t codes[C::kCodes];
  for (int i = 0; i < C::kCodes; ++i)
    codes[i] = static_cast<uint8_t>((i * 37 + i / 16) & ((1 << kBits) - 1));
  uint8_t row[C::kRowBytes + C::kHighBytes];
  pack_row(codes, C::kCodes, kBits, row);
  for (int r = 0; r < kMmaRows; ++r) {
    std::vector<uint8_t> stage(C::kBytes);
    for (int i = 0; i < C::kCopies; ++i) {
      for (int lane = 0; lane < 32; ++lane) {
        const Copy copy = copy_of<kBits>(i, lane);
        if (copy.row == r)
          memcpy(&stage[static_cast<size_t>(copy.target)],
                 row + (copy.high ? C::kRowBytes : 0) + copy.source, 16);
      }
    }
    for (int segment = 0; segment < C::kSegments; ++segment) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        const LaneCodes got = load_codes<kBits>(stage.data(), r, segment, quarter);
        for (int j = 0; j < 8; ++j) {
          const uint8_t* want = codes + segment * kSegment + quarter * 16 + 2 * j;
          if constexpr (kBits < 8) {
            const uint32_t offset = pair_offset<kBits>(got, j, 5);
            EXPECT_EQ(offset % 128, 20u);
            ASSERT_LT(offset, static_cast<uint32_t>(kTableBytes<kBits>));
            unsigned first, second;
            codes_of_entry<kBits>(offset / 128, &first, &second);
            EXPECT_EQ(first, want[0]);
            EXPECT_EQ(second, want[1]);
          } else {
            const uint32_t pair =
                weights_of_pair<8, FloatType::kBFloat16, Decoding::kArithmetic>(got, j, 0, nullptr);
            EXPECT_EQ(bfloat16_to_float(static_cast<uint16_t>(pair)), want[0] - 128.0f);
            EXPECT_EQ(bfloat16_to_float(static_cast<uint16_t>(pair >> 16)), want[1] - 128.0f);
          }
        }
      }
    }
  }
}

TEST(MmaMaps, LanesFindTheirCodes) {
  check_pairs<2>();
  check_pairs<3>();
  check_pairs<4>();
  check_pairs<8>();
}

// Codes of 4 bits that arithmetic decodes are those of x at the same places.
TEST(MmaMaps, NibblesMeetTheirXAndAreExactInBothTypes) {
  const LaneCodes codes{{0x67452301u, 0xefcdab89u, 0, 0}};  // bytes of the codes 0 1, 2 3, …
  for (int j = 0; j < 8; ++j) {
    uint16_t numbers[8];
    for (int i = 0; i < 8; ++i) numbers[i] = static_cast<uint16_t>(i + j / 4 * 8);
    uint32_t words[4];
    memcpy(words, numbers, sizeof words);
    interleave(words);
    const auto bf =
        weights_of_pair<4, FloatType::kBFloat16, Decoding::kArithmetic>(codes, j, 0, nullptr);
    const auto half =
        weights_of_pair<4, FloatType::kFloat16, Decoding::kArithmetic>(codes, j, 0, nullptr);
    for (int i : {0, 16}) {
      const float want = static_cast<float>(words[j % 4] >> i & 0xffffu) - 8.0f;
      EXPECT_EQ(bfloat16_to_float(static_cast<uint16_t>(bf >> i)), want) << j;
      EXPECT_EQ(half_to_float(static_cast<uint16_t>(half >> i)), want) << j;
    }
  }
}

TEST(MmaMaps, EveryByteIsExactInBothTypes) {
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const LaneCodes codes{{byte << 8, 0, 0, 0}};
    const auto bf =
        weights_of_pair<8, FloatType::kBFloat16, Decoding::kArithmetic>(codes, 0, 0, nullptr) >> 16;
    const auto half =
        weights_of_pair<8, FloatType::kFloat16, Decoding::kArithmetic>(codes, 0, 0, nullptr) >> 16;
    EXPECT_EQ(bfloat16_to_float(static_cast<uint16_t>(bf)), static_cast<float>(byte) - 128.0f);
    EXPECT_EQ(half_to_float(static_cast<uint16_t>(half)), static_cast<float>(byte) - 128.0f);
  }
}

TEST(MmaMaps, UnitsOfXLieOnceAndAreReadWithoutConflicts) {
  for (int columns : {1, 3, 8, 20}) {
    std::set<int> places;
    for (int column = 0; column < columns; ++column)
      for (int unit = 0; unit < 32; ++unit) places.insert(x_place_of_unit(unit, column, columns));
    EXPECT_EQ(places.size(), static_cast<size_t>(columns * 32));
    EXPECT_EQ(*places.rbegin(), columns * 32 * 16 - 16);
    EXPECT_EQ(worst_conflict(16,
                             [&](int lane) {
                               const Lane at = lane_of(lane);
                               return x_place(1, 1, std::min(at.row, columns - 1), columns,
                                              at.quarter);
                             }),
              1);
  }
  // Columns 16q to 16q + 15 of a segment are lane q's: the first eight in half 0.
  EXPECT_EQ(x_place_of_unit(8 + 2 * 3 + 1, 2, 5), x_place(1, 1, 2, 5, 3));
}

TEST(MmaMaps, GroupOfEverySegment) {
  PackedView view{};
  view.groups = 2;
  for (int64_t size = kSegment; size <= kMaxGroupSize; size += kSegment) {
    view.group_size = size;
    const uint32_t inverse = inverse_of_segments(view);
    for (uint32_t segment : {0u, 1u, static_cast<uint32_t>(size / kSegment) - 1,
                             static_cast<uint32_t>(size / kSegment), 77777u, (1u << 18) - 1}) {
      const uint64_t group = inverse ? uint64_t{segment} * inverse >> 32 : segment;
      ASSERT_EQ(group, segment * kSegment / static_cast<uint64_t>(size)) << size << " " << segment;
    }
  }
  view.groups = 1;
  EXPECT_EQ(uint64_t{1u << 18} * inverse_of_segments(view) >> 32, 0u);
}

}  // namespace
}  // namespace bitfold::cuda
