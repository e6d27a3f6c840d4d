#include "cuda/encode.h"

#include <algorithm>
#include <cmath>

namespace bitfold::cuda {
namespace {

// What is said by comparing with the pivots one after the other.
unsigned code_above(const Codebook& book, float x, bool or_at) {
  int rank = 0;
  for (int p = 0; p < book.pivot_count; ++p)
    rank += or_at ? x >= book.pivots[p] : x > book.pivots[p];
  return book.code_of_rank[rank];
}

}  // namespace

DeviceEncoding make_encoding(const Format& format) {
  DeviceEncoding encoding{};
  encoding.bits = format.bits();
  encoding.zero = format.zero;
  encoding.book = format.family() == Family::kFixedCodebook;
  if (!encoding.book) return encoding;
  const Codebook& book = *format.element().codebook;
  std::copy_n(book.levels, book.count, encoding.levels);
  for (uint32_t b = 0; b < kBins; ++b) {
    Bin& bin = encoding.bins[b];
    bin.pivot = INFINITY;
    for (int p = 0; p < book.pivot_count; ++p)
      if (bin_of(book.pivots[p]) == b) bin.pivot = book.pivots[p];
    // Without a pivot one code fills the bin; its middle has it.
    const float middle = (static_cast<float>(b) + 0.5f - kBinOfZero) / kBinsPerOne;
    const bool none = std::isinf(bin.pivot);
    bin.codes = code_above(book, none ? middle : bin.pivot, false);
    bin.codes |= code_above(book, none ? middle : bin.pivot, true) << 8;
  }
  return encoding;
}

DynamicSteps make_dynamic_steps() {
  constexpr int kPoints = 65536;
  DynamicSteps steps;
  int point = 0;
  for (int k = 0; k < 255; ++k) {
    const double middle = (static_cast<double>(kDynamicMap[k]) + kDynamicMap[k + 1]) / 2;
    while (2.0 * point / (kPoints - 1) - 1.0 <= middle) ++point;
    steps.step[k] = static_cast<uint16_t>(point);
  }
  return steps;
}

}  // namespace bitfold::cuda
