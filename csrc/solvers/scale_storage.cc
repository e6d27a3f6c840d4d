#include "solvers/scale_storage.h"

#include <algorithm>
#include <cmath>

#include "core/float16.h"
#include "core/scale_coding.h"

namespace bitfold {
namespace {

constexpr float kLargestHalf = 65504.0f;

void store_halves(int exponent, std::vector<float>* values, uint16_t* halves) {
  const auto n = static_cast<int64_t>(values->size());
  encode_halves(values->data(), n, exponent, halves);
  const float factor = std::ldexp(1.0f, exponent);
  for (size_t i = 0; i < values->size(); ++i) (*values)[i] = half_to_float(halves[i]) * factor;
}

}  // namespace

ScaleStorage::ScaleStorage(const KernelTable& k, const Format& format, int64_t rows, int64_t cols,
                           void* const* buffers, const Parallel& parallel)
    : k_(k),
      format_(format),
      rows_(rows),
      cols_(cols),
      groups_(format.groups_per_row(cols)),
      parallel_(parallel) {
  size_t i = 0;
  for (const BufferSpec& spec : format.buffers(rows, cols)) {
    buffer_[static_cast<size_t>(spec.role)] = buffers[i++];
  }
}

void ScaleStorage::store_exponent(int exponent) {
  *buffer<int8_t>(BufferRole::kExponent) = static_cast<int8_t>(exponent);
}

void ScaleStorage::store_scales(int exponent, std::vector<float>* scales, std::vector<float>* zeros,
                                bool replace) {
  const auto n = static_cast<int64_t>(scales->size());
  if (stores_halves()) {
    store_exponent(exponent);
    store_halves(exponent, scales, buffer<uint16_t>(BufferRole::kScale));
  } else if (!format_.double_quant) {
    std::copy(scales->begin(), scales->end(), buffer<float>(BufferRole::kScale));
  } else {
    auto* codes = buffer<uint8_t>(BufferRole::kScale);
    auto* absmax = buffer<float>(BufferRole::kScaleAbsmax);
    auto* offset = buffer<float>(BufferRole::kScaleOffset);
    double_quantize(scales->data(), n, codes, absmax, offset, parallel_);
    if (!replace) return;
    const std::vector<float> wanted = *scales;
    double_dequantize(codes, absmax, *offset, n, scales->data());
    if (format_.zero == Zero::kFloat) follow_scales(wanted, *scales, zeros);
  }
}

// A real zero point may lie a thousand codes away (a group of equal weights), and would multiply
// what the 8-bit code of the scale lost: it moves so that the middle of the grid stays where it
// was.
void ScaleStorage::follow_scales(const std::vector<float>& wanted, const std::vector<float>& scales,
                                 std::vector<float>* zeros) const {
  const float middle = static_cast<float>((1 << format_.bits()) - 1) / 2;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i] == 0.0f || scales[i] == 0.0f) continue;  // all zeros: code 0 is zero
    (*zeros)[i] = std::clamp(middle - (middle - (*zeros)[i]) * (wanted[i] / scales[i]),
                             -kLargestHalf, kLargestHalf);
  }
}

void ScaleStorage::store_zeros(int64_t r, float* zeros) {
  if (format_.zero == Zero::kFloat) {
    uint16_t* halves = buffer<uint16_t>(BufferRole::kZero) + first_scale(r);
    k_.from_float(zeros, groups_, FloatType::kFloat16, halves);
    k_.to_float(halves, FloatType::kFloat16, groups_, zeros);
  } else if (format_.zero == Zero::kInt) {
    // Packed like the codes of a row of weights: an integer is its own code.
    const Encoding integers{format_.bits(), Zero::kInt, nullptr};
    const float one = 1.0f, none = 0.0f;
    k_.encode(integers, zeros, groups_, groups_, &one, &none,
              buffer<uint8_t>(BufferRole::kZero) + r * packed_row_bytes(groups_, format_.bits()));
  }
}

void ScaleStorage::store_books(std::vector<float>* books) {
  MagnitudeRange range;
  range.add(books->data(), static_cast<int64_t>(books->size()));
  const int exponent = choose_exponent(range);
  store_exponent(exponent);
  store_halves(exponent, books, buffer<uint16_t>(BufferRole::kCodebook));
}

std::vector<std::vector<uint8_t>> ScaleStorage::save() const {
  std::vector<std::vector<uint8_t>> saved;
  for (const BufferSpec& spec : format_.buffers(rows_, cols_)) {
    if (spec.role == BufferRole::kCodes) continue;
    const auto* from = buffer<uint8_t>(spec.role);
    saved.emplace_back(from, from + spec.nbytes());
  }
  return saved;
}

void ScaleStorage::restore(const std::vector<std::vector<uint8_t>>& saved) {
  size_t i = 0;
  for (const BufferSpec& spec : format_.buffers(rows_, cols_)) {
    if (spec.role == BufferRole::kCodes) continue;
    std::copy(saved[i].begin(), saved[i].end(), buffer<uint8_t>(spec.role));
    ++i;
  }
}

void ScaleStorage::round(int exponent, int64_t n, float* scale, float* zero) const {
  if (stores_halves()) {
    const float factor = std::ldexp(1.0f, exponent);
    for (int64_t i = 0; i < n; ++i) {
      const float fraction = std::ldexp(scale[i], -exponent);
      scale[i] = half_to_float(float_to_half(std::min(fraction, kLargestHalf))) * factor;
    }
  }
  if (format_.zero == Zero::kFloat) {
    for (int64_t i = 0; i < n; ++i)
      zero[i] = half_to_float(float_to_half(std::clamp(zero[i], -kLargestHalf, kLargestHalf)));
  }
}

}  // namespace bitfold
