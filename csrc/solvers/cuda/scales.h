// Scales and zero points of a matrix on a GPU: into the buffers of its format, and back.
#pragma once

#include <vector>

#include "cuda/rounding.h"
#include "solvers/cuda/gpu.h"

namespace bitfold {

// How the scales of a layer go into the buffers of its format and come back as a reader decodes
// them.
class GpuScales {
 public:
  GpuScales(GpuRun* run, const Format& format, const cuda::RoundingMatrix& w,
            const cuda::DeviceEncoding& encoding, void* const* buffers);

  const Format& format() const { return format_; }

  // Scale and zero [spans], to be filled and stored.
  float* scale() { return scale_; }
  float* zero() { return zero_; }
  const cuda::Spans& spans() const { return spans_; }

  // Of fp16 scales, null for others: the power of two that is in the buffer, or that suits scale(),
  // if some of them may become `finest` times as large.
  const int8_t* exponent() const { return exponent_; }
  void find_exponent(float finest = 1.0f);
  // n of them as they are stored with it.
  void round(int64_t n, float* scale, float* zero);

  // scale() and zero() into the buffers, with that exponent, and what a reader decodes over the
  // matrix.
  void store();
  void spread();
  // The same with those of the matrix.
  void collect();
  void store_matrix();
  cuda::StoredRounding rounding() const {
    return {exponent_ != nullptr, format_.zero == Zero::kFloat};
  }

  // What the buffers hold beside codes, and the matrix, to return to.
  void save();
  void restore();

  // Codes into their buffer; codes and scales out of theirs into the matrix.
  void store_codes();
  void read_packed();

 private:
  struct Part {
    void *memory, *copy;
    int64_t bytes;
  };
  void add_part(void* memory, int64_t bytes);

  GpuRun& run_;
  const Format& format_;
  const cuda::RoundingMatrix& w_;
  const cuda::DeviceEncoding& encoding_;
  void* const* buffers_;
  const cuda::FoldBuffers to_;
  const cuda::Spans spans_;
  float *scale_, *zero_;
  cuda::ScalePart* parts_;
  int8_t* exponent_ = nullptr;
  std::vector<Part> saved_;
};

}  // namespace bitfold
