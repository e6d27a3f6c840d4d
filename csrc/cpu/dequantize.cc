#include "cpu/dequantize.h"

#include <algorithm>
#include <atomic>

#include "cpu/decoder.h"

namespace bitfold {
namespace {

// A result of this size would push everything else out of the caches and not stay there itself.
constexpr int64_t kStreamBytes = int64_t{1} << 24;

// A range handed to one thread should decode at least this many weights, or starting it costs more
// than it saves.
constexpr int64_t kGrainWeights = 1 << 16;

}  // namespace

void dequantize(const KernelTable& k, const PackedView& w, FloatType dtype, void* out,
                const Parallel& parallel) {
  const int64_t out_bytes = w.rows * w.cols * size_of(dtype);
  const bool stream = out_bytes >= kStreamBytes;
  parallel(w.rows, grain(w.cols, kGrainWeights), [&](int64_t begin, int64_t end) {
    Decoder decode(k, w);
    for (int64_t r = begin; r < end; ++r)
      decode.row(r, dtype, advance(out, dtype, r * w.cols), stream);
    // Streamed stores are ordered by no ordinary hand-over between threads.
    if (stream) std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

void embedding(const KernelTable& k, const PackedView& w, const int64_t* indices, int64_t count,
               FloatType dtype, void* out, const Parallel& parallel) {
  parallel(count, grain(w.cols, kGrainWeights), [&](int64_t begin, int64_t end) {
    Decoder decode(k, w);
    for (int64_t i = begin; i < end; ++i)
      decode.row(indices[i], dtype, advance(out, dtype, i * w.cols), /*stream=*/false);
  });
}

}  // namespace bitfold
