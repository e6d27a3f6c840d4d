// Passes over the columns of a matrix on a GPU: as solvers/feedback.h.
#pragma once

#include <functional>
#include <vector>

#include "cuda/rounding.h"
#include "solvers/cuda/gpu.h"
#include "solvers/factor.h"
#include "solvers/options.h"
#include "solvers/sections.h"

namespace bitfold {

// A layer in the GPU's memory.
struct GpuLayer {
  cuda::RoundingMatrix w;
  cuda::DeviceEncoding encoding;
  cuda::ColumnPlaces places;
  const float* lower;  // [cols, cols] by position: the factor of the damped Hessian
  const float*
      hessian;  // [cols, cols] by position, damped; null unless swept, measured or refitted
  const Factorization& f;  // without the matrices
};

class GpuFeedback {
 public:
  // loss [w.rows] is the caller's.
  GpuFeedback(GpuRun* run, const GpuLayer& layer, double* loss, Seconds* seconds);

  // Chooses the scales of `group` from values [columns, rows].
  using ChooseScales = std::function<void(int64_t group, const float* values, int64_t columns)>;

  void solve();
  void solve(const ChooseScales& choose);
  void sweep();
  // Errors and losses of the codes, scales and zero points in the matrix.
  void measure();

  float* error() { return error_; }  // [cols, rows] by position
  double* loss() { return loss_; }   // by row
  double total_loss();               // waits
  float* row_of(float* matrix, int64_t i) const { return matrix + i * w_.stride; }

 private:
  void pass(const float* matrix, bool again, const std::vector<Section>& sections,
            const ChooseScales& choose);
  void correct(const float* matrix, bool again, const Section& section);
  void pass_on(const float* matrix, bool again, const Section& section, const Block& block);
  void start_group(const float* matrix, const Section& section, const Block& block,
                   const ChooseScales& choose);
  void round_block(const float* matrix, bool again, const Section& section, const Block& block);
  void clear_losses() { run_.note(cuda::clear(loss_, 8 * w_.rows, run_.stream)); }
  // Room for a section of so many columns.
  void make_room(int64_t columns);

  GpuRun& run_;
  const LinearAlgebra& algebra_;
  const GpuLayer& layer_;
  const cuda::RoundingMatrix& w_;
  Seconds& seconds_;
  const int64_t n_, rows_;
  double* loss_;
  float* error_;
  float *correction_ = nullptr, *change_ = nullptr;  // of a section
  int64_t room_ = 0;
  float* values_ = nullptr;  // of a group
};

}  // namespace bitfold
