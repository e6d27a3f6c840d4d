// How far the range of a group of weights is shrunk, in turn, when its scale is searched by squared
// error.
#pragma once

namespace bitfold {

inline constexpr int kSymmetricSteps = 16;  // geometric, from the whole range down to a floor
inline constexpr int kRangeSteps = 5;       // per end of an asymmetric range: 25 pairs
inline constexpr int kMaxChoices = kRangeSteps * kRangeSteps;
inline constexpr int kRefinements = 3;  // least squares afterwards
static_assert(kSymmetricSteps <= kMaxChoices);

// The factors to try, the whole range first.
struct Shrinks {
  int count = 0;
  float low[kMaxChoices], high[kMaxChoices];
};
Shrinks shrinks_for(int bits, bool asymmetric);

}  // namespace bitfold
