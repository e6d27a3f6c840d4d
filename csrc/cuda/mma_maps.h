// Which lane of a warp holds what, while sixteen rows of a weight are multiplied by eight rows of x
// at a time with mma.sync m16n8k16: straight from the stored bytes. A dot product does not mind the
// order of its terms, so the four lanes that share a row own sixteen neighbouring codes each,
// whatever column numbers the instruction gives them. Everything here runs on the host as well,
// where tests walk a whole tile lane by lane.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/decode.h"

namespace bitfold::cuda {

inline constexpr int kMmaRows = 16, kMmaColumns = 8;
inline constexpr int kMaxMmaTiles = 8;  // of eight rows of x, in one pass over the weight
inline constexpr int kSegment = 64;  // columns that a row's four lanes share out; never two groups
inline constexpr int kSteps = 4;     // mma per segment
inline constexpr int kStages = 3;    // chunks that a warp has in shared memory or on the way

// Fragments as the instruction wants them: a lane's row (and the one eight below) of the weight, or
// its row of x, is lane / 4; its place among the four lanes of a row is lane % 4.
struct Lane {
  int row, quarter;
};
BITFOLD_HOST_DEVICE inline Lane lane_of(int lane) { return {lane / 4, lane % 4}; }

// ---- codes: sixteen rows of a chunk, on their way through shared memory

template <int kBits>
struct Chunk {
  static constexpr int kCodes = kBits == 8 ? 128 : 256;  // columns; a cache line per row at 4 bits
  static constexpr int kSegments = kCodes / kSegment;
  static constexpr int kRowBytes = kCodes * (kBits == 3 ? 2 : kBits) / 8;
  static constexpr int kHighBytes = kBits == 3 ? kCodes / 8 : 0;  // the plane of high bits
  static constexpr int kBytes = kMmaRows * (kRowBytes + kHighBytes);
  static constexpr int kCopies = kBytes / 16 / 32;  // 16 bytes each, per lane
};

// Units of 16 bytes change places within a row, so that the lanes of a load find different banks.
template <int kRowBytes>
BITFOLD_HOST_DEVICE inline int swizzled(int row, int byte) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
  const int turn = kRowBytes == 64 ? (row >> 1) & 3 : (row >> 2) & 1;
  return row * kRowBytes + (byte ^ (turn << 4));
}
// Rows of 128 bytes: eight bytes per lane at 4 bits, sixteen at 8.
template <int kBits>
BITFOLD_HOST_DEVICE inline int place_of(int row, int byte) {
  if constexpr (kBits == 4) return row * 128 + (byte ^ ((row & 3) << 5));
  if constexpr (kBits == 8) return row * 128 + (byte ^ ((row & 1) << 6));
  return swizzled<64>(row, byte);
}

// Sixteen bytes that a lane fetches.
struct Copy {
  int row;     // of the sixteen
  bool high;   // of the plane of high bits
  int source;  // byte within the chunk's bytes of that row and plane
  int target;  // byte within the stage
};

template <int kBits>
BITFOLD_HOST_DEVICE inline Copy copy_of(int i, int lane) {
  using C = Chunk<kBits>;
  constexpr int kUnits = C::kRowBytes / 16, kLowCopies = C::kRowBytes / 32;
  if (kBits == 3 && i >= kLowCopies) {
    const int row = lane / 2, byte = lane % 2 * 16;
    return {row, true, byte, kMmaRows * C::kRowBytes + swizzled<32>(row, byte)};
  }
  const int unit = i * 32 + lane, row = unit / kUnits, byte = unit % kUnits * 16;
  return {row, false, byte, place_of<kBits>(row, byte)};
}

// A lane's sixteen codes of one row and segment, as they lie; 3 bits: the low bits, then the high
// ones in the lower half of the second word.
struct LaneCodes {
  uint32_t word[4];
};

// One load, from an address that is a multiple of its size.
template <int kBytes>
BITFOLD_HOST_DEVICE inline void load_shared(const uint8_t* from, uint32_t* words) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kBytes == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (kBytes == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
  }
#else
  words[0] = 0;
  memcpy(words, from, kBytes);
#endif
}

template <int kBits>
BITFOLD_HOST_DEVICE inline LaneCodes load_codes(const uint8_t* stage, int row, int segment,
                                                int quarter) {
  LaneCodes codes{};
  constexpr int kLaneBytes = Chunk<kBits>::kRowBytes / Chunk<kBits>::kSegments / 4;
  load_shared<kLaneBytes>(stage + place_of<kBits>(row, (segment * 4 + quarter) * kLaneBytes),
                          codes.word);
  if constexpr (kBits == 3) {
    load_shared<2>(
        stage + kMmaRows * Chunk<3>::kRowBytes + swizzled<32>(row, (segment * 4 + quarter) * 2),
        codes.word + 1);
  }
  return codes;
}

// ---- decoding: two codes at once, through a table with an entry for every pair, once per lane, so
// that each lane reads from a bank of its own; or, where they are integers whose middle is one too,
// by arithmetic, which leaves shared memory to everything else

enum class Decoding : uint8_t { kTable, kArithmetic };
BITFOLD_HOST_DEVICE inline Decoding decoding_of(const PackedView& view) {
  const bool whole = view.bits == 8 || (view.bits == 4 && view.zero_kind != Zero::kMidrise);
  return view.family == Family::kInteger && whole ? Decoding::kArithmetic : Decoding::kTable;
}
// Of weights with so many bits: 4 have both.
template <int kBits>
inline constexpr Decoding kOnlyDecoding = kBits == 8 ? Decoding::kArithmetic : Decoding::kTable;

template <int kBits>
inline constexpr int kTableEntries = kBits == 8 ? 0 : 1 << (2 * kBits);
template <int kBits>
inline constexpr int kTableBytes = kTableEntries<kBits> * 128;

BITFOLD_HOST_DEVICE constexpr uint32_t moved(uint32_t word, int from, int to) {
  return from < to ? word << (to - from) : word >> (from - to);
}

// Where in the table the codes 2j and 2j + 1 are, j < 8 known to the compiler. The bits of a pair
// are looked up in the order in which they lie: 3 bits have the two high ones in front.
template <int kBits>
BITFOLD_HOST_DEVICE inline uint32_t pair_offset(const LaneCodes& codes, int j, int lane) {
  static_assert(kBits < 8);
  const uint32_t own = static_cast<uint32_t>(lane) * 4;
  if constexpr (kBits == 4) return (moved(codes.word[j / 4], 8 * (j % 4), 7) & 0x7f80u) | own;
  const uint32_t low = (moved(codes.word[0], 8 * (j / 2) + (j % 2 ? 0 : 4), 7) & 0x780u) | own;
  if constexpr (kBits == 2) return low;
  return (moved(codes.word[1], 8 * (j / 4) + 6 - 2 * (j % 4), 11) & 0x1800u) | low;
}

// The codes that an entry of the table is about.
template <int kBits>
BITFOLD_HOST_DEVICE inline void codes_of_entry(unsigned entry, unsigned* first, unsigned* second) {
  constexpr unsigned kLow = kBits == 4 ? 4 : 2;
  *first = (entry >> kLow) & ((1u << kLow) - 1);
  *second = entry & ((1u << kLow) - 1);
  if constexpr (kBits == 3) {
    *first |= (entry >> 5 & 1u) << 2;
    *second |= (entry >> 4 & 1u) << 2;
  }
}

// Integer grids are multiplied as code - middle, which both halves and bfloat16 hold exactly; what
// the zero point differs from that is made good with the sum of x.
BITFOLD_HOST_DEVICE inline float middle_of(const PackedView& view) {
  const float middle = static_cast<float>(1 << (view.bits - 1));
  return view.zero_kind == Zero::kMidrise && view.bits < 8 ? middle - 0.5f : middle;
}
BITFOLD_HOST_DEVICE inline bool is_shifted(const PackedView& view) {
  return view.family == Family::kInteger &&
         (view.zero_kind == Zero::kInt || view.zero_kind == Zero::kFloat ||
          (view.zero_kind == Zero::kMidrise && view.bits == 8));
}

template <FloatType kType>
BITFOLD_HOST_DEVICE inline uint32_t to_pair(float first, float second) {
  return kType == FloatType::kFloat16 ? to_half_pair(first, second)
                                      : to_bfloat16_pair(first, second);
}

template <int kBits, FloatType kType>
BITFOLD_HOST_DEVICE inline uint32_t table_entry(const DeviceWeight& w, unsigned entry,
                                                float level_factor) {
  unsigned first, second;
  codes_of_entry<kBits>(entry, &first, &second);
  if (w.view.family == Family::kInteger) {
    const float middle = middle_of(w.view);
    return to_pair<kType>(static_cast<float>(first) - middle, static_cast<float>(second) - middle);
  }
  return to_pair<kType>(w.levels[first] * level_factor, w.levels[second] * level_factor);
}

// The numbers in bits 0 to 3 and 16 to 19 of a word, less eight. As the last bits of 128 or 1024
// they are floats at once; the subtraction is exact.
template <FloatType kType>
BITFOLD_HOST_DEVICE inline uint32_t less_eight(uint32_t word) {
#if defined(__CUDA_ARCH__)
  constexpr bool kHalf = kType == FloatType::kFloat16;
  uint32_t pair;  // word & mask | offset, which the compiler would make two instructions of
  asm("lop3.b32 %0, %1, %2, %3, 0xea;"
      : "=r"(pair)
      : "r"(word), "r"(0x000f000fu), "r"(kHalf ? 0x64006400u : 0x43004300u));
  if constexpr (kHalf) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(pair)
        : "r"(pair), "r"(0x3c003c00u), "r"(0xe408e408u));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(pair)
        : "r"(pair), "r"(0x3f803f80u), "r"(0xc308c308u));
  }
  return pair;
#else
  return to_pair<kType>(static_cast<float>(word & 15u) - 8.0f,
                        static_cast<float>(word >> 16 & 15u) - 8.0f);
#endif
}

// Two codes as operands: 2j and 2j + 1; by arithmetic those of 4 bits lie four apart, as eight of x
// then do (interleaved).
template <int kBits, FloatType kType, Decoding kDecoding>
BITFOLD_HOST_DEVICE inline uint32_t weights_of_pair(const LaneCodes& codes, int j, int lane,
                                                    const uint8_t* table) {
  if constexpr (kBits == 8) {
    const uint32_t word = codes.word[j / 2];
    const int shift = j % 2 * 16;
    constexpr float kBias = 8388608.0f + 128.0f;
    return to_pair<kType>(float_from_bits(0x4b000000u | (word >> shift & 255u)) - kBias,
                          float_from_bits(0x4b000000u | (word >> (shift + 8) & 255u)) - kBias);
  } else if constexpr (kDecoding == Decoding::kArithmetic) {
    static_assert(kBits == 4);  // the first of two codes is in the upper half of its byte
    return less_eight<kType>(codes.word[j / 4] >> (j % 4 / 2 * 8 + (j % 2 ? 0 : 4)));
  } else {
    uint32_t pair;
    load_shared<4>(table + pair_offset<kBits>(codes, j, lane), &pair);
    return pair;
  }
}

// Operand A of step s: the lane's row and the one eight below, codes 4s to 4s + 3 of each.
struct MmaA {
  uint32_t word[4];
};
template <int kBits, FloatType kType, Decoding kDecoding>
BITFOLD_HOST_DEVICE inline MmaA operand_of(const LaneCodes& upper, const LaneCodes& lower, int step,
                                           int lane, const uint8_t* table) {
  return {{weights_of_pair<kBits, kType, kDecoding>(upper, 2 * step, lane, table),
           weights_of_pair<kBits, kType, kDecoding>(lower, 2 * step, lane, table),
           weights_of_pair<kBits, kType, kDecoding>(upper, 2 * step + 1, lane, table),
           weights_of_pair<kBits, kType, kDecoding>(lower, 2 * step + 1, lane, table)}};
}

// ---- x: units of eight numbers, in the order in which lanes read them, `columns` rows of x
// side by side. A unit serves two steps, half of a segment.

BITFOLD_HOST_DEVICE inline int x_place(int segment, int half, int column, int columns,
                                       int quarter) {
  return (((segment * 2 + half) * columns + column) * 4 + quarter) * 16;
}
// The unit with the columns from 8 * unit on.
BITFOLD_HOST_DEVICE inline int x_place_of_unit(int unit, int column, int columns) {
  return x_place(unit / 8, unit % 2, column, columns, unit % 8 / 2);
}

// Whether the eight numbers of a unit lie in the order 0 4 1 5 2 6 3 7.
template <int kBits, Decoding kDecoding>
inline constexpr bool kInterleaved = kBits == 4 && kDecoding == Decoding::kArithmetic;
BITFOLD_HOST_DEVICE inline void interleave(uint32_t (&words)[4]) {
  const uint32_t low[2] = {words[0], words[1]}, high[2] = {words[2], words[3]};
  for (int i = 0; i < 2; ++i) {
    words[2 * i] = (low[i] & 0xffffu) | high[i] << 16;
    words[2 * i + 1] = low[i] >> 16 | (high[i] & 0xffff0000u);
  }
}

// ---- accumulators: word i of a lane is row row_of(i) and row column_of(i) of x, within the tile

BITFOLD_HOST_DEVICE inline int accumulator_row(int lane, int i) {
  return lane / 4 + (i < 2 ? 0 : kMmaColumns);
}
BITFOLD_HOST_DEVICE inline int accumulator_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// The group of segment s is the high word of s * inverse, or s itself where inverse is 0: exact for
// segments below 2^22 and groups of up to 1024 of them.
BITFOLD_HOST_DEVICE inline uint32_t inverse_of_segments(const PackedView& view) {
  if (view.groups == 1) return 1;  // always group 0
  const auto segments = static_cast<uint32_t>(view.group_size / kSegment);
  return segments == 1 ? 0 : 0xffffffffu / segments + 1;
}

}  // namespace bitfold::cuda
