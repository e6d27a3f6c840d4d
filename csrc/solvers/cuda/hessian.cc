#include "solvers/cuda/hessian.h"

#include <algorithm>
#include <type_traits>

#include "cuda/copy.h"
#include "cuda/statistics.h"

namespace bitfold {
namespace {

constexpr int64_t kChunkBytes = int64_t{1} << 28;  // of rows that are worked on at a time
constexpr int64_t kBlocks = 4;  // columns are cut in: (4 + 1) / 2 of 4 are done, in products that
constexpr int64_t kLeastBlock = 512;  // are large enough for all multiprocessors

template <class T>
const LinearAlgebra::Gemm<T>& gemm_of(const LinearAlgebra& algebra) {
  if constexpr (std::is_same_v<T, float>) {
    return algebra.gemm;
  } else {
    return algebra.gemm64;
  }
}

// multiply(rows, differences, count, share of the old mean, share of each new row), chunk by chunk:
// rows of x as T, and those of x_float less x, where that is not null. Rows that do not count are
// zeros there.
template <class T, class Multiply>
Status each_chunk(const Gpu& gpu, const MatrixView& x, const MatrixView* x_float,
                  const uint8_t* mask, int64_t tokens, const Multiply& multiply, Counts* counts) {
  *counts = {};
  if (x.rows == 0) return Status::success();
  auto* kinds = gpu.memory<uint8_t>(x.rows);
  auto* seen = gpu.memory<cuda::RowCounts>(1);
  cuda::RowCounts found{};
  Status status = cuda::clear(seen, sizeof found, gpu.stream);
  if (status.ok()) status = cuda::look_at_rows(x, x_float, mask, kinds, seen, gpu.stream);
  if (status.ok()) status = cuda::copy_to_host(&found, seen, sizeof found, gpu.stream);
  if (!status.ok()) return status;
  *counts = {static_cast<int64_t>(found.counted), static_cast<int64_t>(found.non_finite)};
  if (counts->counted == 0) return Status::success();

  const double before = static_cast<double>(tokens),
               now = before + static_cast<double>(counts->counted);
  const bool as_it_is = std::is_same_v<T, float> && x.dtype == FloatType::kFloat32 &&
                        x.row_stride == x.cols && x.col_stride == 1 && !x_float &&
                        counts->counted == x.rows;
  const int64_t most =
      std::clamp<int64_t>(kChunkBytes / (static_cast<int64_t>(sizeof(T)) * x.cols), 1, x.rows);
  T* copied = as_it_is ? nullptr : gpu.memory<T>(most * x.cols);
  T* differences = x_float ? gpu.memory<T>(most * x.cols) : nullptr;
  for (int64_t first = 0; first < x.rows; first += most) {
    const int64_t count = std::min(most, x.rows - first);
    const T* rows = copied;
    if (as_it_is) {
      rows = static_cast<const T*>(x.data) + first * x.cols;
    } else {
      status = cuda::copy_rows(x, nullptr, kinds, first, count, std::is_same_v<T, double>, copied,
                               gpu.stream);
    }
    if (status.ok() && x_float) {
      status = cuda::copy_rows(x, x_float, kinds, first, count, std::is_same_v<T, double>,
                               differences, gpu.stream);
    }
    if (!status.ok()) return status;
    multiply(rows, differences, count, static_cast<T>(first == 0 ? before / now : 1.0),
             static_cast<T>(1.0 / now));
  }
  return status;
}

}  // namespace

template <class T>
Status update_hessian(const Gpu& gpu, const MatrixView& x, const uint8_t* mask, int64_t tokens,
                      T* hessian, Counts* counts) {
  const int64_t n = x.cols;
  const int64_t block = std::max(kLeastBlock, (n + kBlocks - 1) / kBlocks);
  const auto multiply = [&](const T* rows, const T* /*differences*/, int64_t count, T old_share,
                            T new_share) {
    for (int64_t low = 0; low < n; low += block) {
      const int64_t high = std::min(n, low + block);
      gemm_of<T>(gpu.algebra)(true, false, high - low, high, count, new_share, rows + low, n, rows,
                              n, old_share, hessian + low * n, n);
    }
  };
  return each_chunk<T>(gpu, x, nullptr, mask, tokens, multiply, counts);
}

template <class T>
Status finish_hessian(const Gpu& gpu, int64_t n, T* hessian) {
  return cuda::mirror({hessian, std::is_same_v<T, double>, n}, gpu.stream);
}

template <class T>
Status update_cross(const Gpu& gpu, const MatrixView& x_float, const MatrixView& x,
                    const uint8_t* mask, int64_t tokens, T* cross, Counts* counts) {
  const int64_t n = x.cols;
  const auto multiply = [&](const T* rows, const T* differences, int64_t count, T old_share,
                            T new_share) {
    gemm_of<T>(gpu.algebra)(true, false, n, n, count, new_share, differences, n, rows, n, old_share,
                            cross, n);
  };
  return each_chunk<T>(gpu, x, &x_float, mask, tokens, multiply, counts);
}

#define BITFOLD_INSTANTIATE(T)                                                                  \
  template Status update_hessian<T>(const Gpu&, const MatrixView&, const uint8_t*, int64_t, T*, \
                                    Counts*);                                                   \
  template Status finish_hessian<T>(const Gpu&, int64_t, T*);                                   \
  template Status update_cross<T>(const Gpu&, const MatrixView&, const MatrixView&,             \
                                  const uint8_t*, int64_t, T*, Counts*);
BITFOLD_INSTANTIATE(float)
BITFOLD_INSTANTIATE(double)
#undef BITFOLD_INSTANTIATE

}  // namespace bitfold
