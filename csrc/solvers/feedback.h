// Passes over the columns of a matrix, blocks of them at a time: what the errors of finished
// columns mean for a block is one product of matrices, inside the block a kernel
// (cpu/kernel_table.h).
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "solvers/factor.h"
#include "solvers/options.h"
#include "solvers/panels.h"
#include "solvers/sections.h"

namespace bitfold {

class Feedback {
 public:
  Feedback(PanelMatrix* w, const Factorization& f, const LinearAlgebra& algebra,
           const Parallel& parallel);

  // Chooses scale [16] and zero [16] of a group when its first column is due, from block [n, 16],
  // what its columns are to be rounded from, and importance [n, 16].
  using ChooseScales = std::function<void(const float* block, const float* importance, int64_t n,
                                          float* scale, float* zero)>;

  // GPTQ, with the scales in the panels.
  void solve();
  // The same with scales chosen on the way, by the importance [cols] of the columns. Groups must be
  // contiguous in the order of rounding.
  void solve(const ChooseScales& choose, const std::vector<float>& importance);
  // One sweep of cyclic coordinate descent on tr(E H E^T) (QuantEase, 2309.01885): each code in
  // turn becomes the best one, all others being what they are. Never raises the loss.
  void sweep();

  // Errors and losses of the codes, scales and zero points in the panels; one product of matrices.
  void measure();

  int64_t stride() const { return stride_; }
  float* error() { return error_.get(); }  // [cols by position, rows at stride()]
  std::vector<double>& loss() {
    return loss_;
  }  // by row: of e H e^T, H damped, dead inputs left out
  double total_loss() const;
  int64_t position_of(int64_t column) const { return position_[static_cast<size_t>(column)]; }
  Seconds seconds;

 private:
  void pass(const float* matrix, bool again, const std::vector<Section>& all,
            const ChooseScales& choose, const std::vector<float>& importance);
  void correct(const float* matrix, bool again, const Section& section);
  void correct_block(const float* matrix, bool again, const Section& section, const Block& block);
  void start_group(const float* matrix, const Section& section, const Block& block,
                   const ChooseScales& choose, const std::vector<float>& importance);
  void round_block(const float* matrix, bool again, const Section& section, const Block& block);
  bool is_dead(int64_t position) const;

  PanelMatrix& w_;
  const Factorization& f_;
  const LinearAlgebra& algebra_;
  const Parallel& parallel_;
  const int64_t n_, width_, stride_;
  std::vector<int64_t> position_;  // by column
  std::unique_ptr<float[]> error_;
  std::vector<float> correction_, change_;  // of a section, at stride_
  std::vector<double> loss_;
};

}  // namespace bitfold
