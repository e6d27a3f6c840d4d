#include "solvers/cuda/scales.h"

namespace bitfold {

GpuScales::GpuScales(GpuRun* run, const Format& format, const cuda::RoundingMatrix& w,
                     const cuda::DeviceEncoding& encoding, void* const* buffers)
    : run_(*run),
      format_(format),
      w_(w),
      encoding_(encoding),
      buffers_(buffers),
      to_(format, w.rows, w.cols, buffers),
      spans_(cuda::spans_of(format, w.rows, w.cols)),
      scale_(cuda::stores_floats(format) ? to_.get<float>(BufferRole::kScale)
                                         : run->gpu.memory<float>(spans_.count())),
      zero_(run->gpu.memory<float>(spans_.count())),
      parts_(run->gpu.memory<cuda::ScalePart>(cuda::kParts)) {
  if (cuda::stores_halves(format)) exponent_ = to_.get<int8_t>(BufferRole::kExponent);
}

void GpuScales::find_exponent(float finest) {
  if (!exponent_) return;
  run_.note(cuda::sum_scales(scale_, spans_.count(), parts_, run_.stream));
  run_.note(cuda::find_exponent(parts_, spans_.count(), finest, exponent_, run_.stream));
}

void GpuScales::round(int64_t n, float* scale, float* zero) {
  run_.note(cuda::round_as_stored(rounding(), exponent_, n, scale, zero, run_.stream));
}

void GpuScales::store() {
  run_.note(cuda::store_scales(format_, spans_, encoding_, to_, /*exactly=*/false, /*known=*/true,
                               scale_, zero_, parts_, run_.stream));
  spread();
}

void GpuScales::spread() {
  run_.note(cuda::spread_spans(spans_, scale_, w_, w_.scale, run_.stream));
  run_.note(cuda::spread_spans(spans_, zero_, w_, w_.zero, run_.stream));
}

void GpuScales::collect() {
  run_.note(cuda::collect_spans(spans_, w_.scale, w_, scale_, run_.stream));
  run_.note(cuda::collect_spans(spans_, w_.zero, w_, zero_, run_.stream));
}

void GpuScales::store_matrix() {
  collect();
  store();
}

void GpuScales::add_part(void* memory, int64_t bytes) {
  saved_.push_back({memory, run_.gpu.allocate(bytes), bytes});
}

void GpuScales::save() {
  if (saved_.empty()) {
    for (const BufferSpec& spec : format_.buffers(w_.rows, w_.cols)) {
      if (spec.role != BufferRole::kCodes) add_part(to_.get<void>(spec.role), spec.nbytes());
    }
    add_part(w_.scale, w_.groups * w_.stride * 4);
    add_part(w_.zero, w_.groups * w_.stride * 4);
  }
  for (const Part& part : saved_)
    run_.note(cuda::copy_on_device(part.copy, part.memory, part.bytes, run_.stream));
}

void GpuScales::restore() {
  for (const Part& part : saved_)
    run_.note(cuda::copy_on_device(part.memory, part.copy, part.bytes, run_.stream));
}

void GpuScales::store_codes() {
  run_.note(
      cuda::pack_columns(w_, format_.bits(), to_.get<uint8_t>(BufferRole::kCodes), run_.stream));
}

void GpuScales::read_packed() {
  const std::vector<const void*> read(buffers_,
                                      buffers_ + format_.buffers(w_.rows, w_.cols).size());
  run_.note(cuda::read_packed(cuda::make_device_weight(format_, w_.rows, w_.cols, read.data()), w_,
                              run_.stream));
}

}  // namespace bitfold
