// The scales that AWQ tries (solvers/awq.h).
#pragma once

#include <vector>

#include "solvers/awq.h"

namespace bitfold {

struct ScaleCandidate {
  double alpha;
  bool by_weight;
  std::vector<float> scale;  // [channels]
};

// The grid, out of means over all columns that carry a channel, weighted by tokens; 1 where there
// is none.
class ScaleGrid {
 public:
  explicit ScaleGrid(int64_t channels);
  // shares [cols]: mean over rows of |w| / max |w| of its group.
  void add(const AwqReader& reader, const std::vector<double>& shares);
  // A scale of 1 first, then the grid but for what is not positive and finite.
  std::vector<ScaleCandidate> finish() const;

 private:
  struct Mean {
    double sum = 0.0, count = 0.0;
    void add(double value, int64_t tokens) {
      sum += value * static_cast<double>(tokens);
      count += static_cast<double>(tokens);
    }
    double get() const { return count > 0.0 ? sum / count : 1.0; }
  };
  std::vector<Mean> inputs_, weights_;  // by channel
};

// Whether there are readers and channels; whether one fits them, all but its Hessian and weights
// looked at.
Status check_grid(size_t readers, int64_t channels);
Status check_reader(const AwqReader& reader, int64_t channels);
// What went wrong, and with which reader.
Status in_reader(size_t reader, const Status& status);

// How many rows of a weight are judged (solvers/awq.h).
int64_t judged_rows(const MatrixView& weight);
// The candidate with the least of losses, one for each, and what is to be reported of it.
const ScaleCandidate& best_of(const std::vector<ScaleCandidate>& all,
                              const std::vector<double>& losses, AwqScale* found);

// A scale of 1 first, then the grid but for what is not positive and finite. Fails on readers that
// do not fit, or hold a NaN or an infinity, naming them.
Status scale_candidates(const KernelTable& k, const std::vector<AwqReader>& readers,
                        int64_t channels, const Parallel& parallel,
                        std::vector<ScaleCandidate>* all);

}  // namespace bitfold
