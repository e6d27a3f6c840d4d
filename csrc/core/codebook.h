// Fixed tables: the levels of each codebook code and the 256-entry map of double quantization.
#pragma once

namespace bitfold {

inline constexpr int kMaxLevels = 16;

inline constexpr int kMaxSteps = 4;

// A codebook prepared for encoding by comparison: rank(x) = number of pivots that x is above, code
// = code_of_rank[rank]. A value on the midpoint of two levels takes the lower one.
//
// Vector encoders find the rank by binary search, each step a look-up in a table of at most eight
// entries: bit k of a path says whether x was above the pivot of step k, and the bits below it are
// where that pivot lies in pivot_of_path[k].
struct Codebook {
  int count;                               // number of levels, 2^bits
  float levels[kMaxLevels];                // by code
  int pivot_count;                         // distinct levels - 1
  float pivots[kMaxLevels];                // ascending
  unsigned char code_of_rank[kMaxLevels];  // by rank

  float pivot_of_path[kMaxSteps][kMaxLevels];  // infinite where there is none left
  float level_of_path[kMaxLevels];
  int code_of_path[kMaxLevels];
};

extern const Codebook kNf4, kNf3, kNf2, kFp4, kLog4;

// Levels found at run time (k-means): `levels` ascending, count <= kMaxLevels.
Codebook sorted_codebook(const float* levels, int count);

// The signed dynamic map of 8-bit optimizers (Dettmers et al., 2110.02861), ascending; index 127 is
// 0, index 255 is 1.
extern const float kDynamicMap[256];

}  // namespace bitfold
