#include "cpu/kernel_table.h"

#include "support.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::random_weights;

constexpr int64_t kM[] = {0, 1, 2, 3, 7, 16, 33};
constexpr int64_t kN[] = {1, 3, 4, 5, 17};
constexpr int64_t kK[] = {1, 15, 16, 17, 31, 64, 197};

// Longest chain of fp32 roundings behind one output: the summands of a lane, sixteen lanes, and
// what was there before.
double bound(int64_t summands, double magnitude) {
  return (static_cast<double>(summands) / 16.0 + 20.0) * testing::kRound * magnitude;
}

TEST(Gemm, RowsTimesRows) {
  const KernelTable& k = active_kernels();
  for (int64_t m : kM)
    for (int64_t n : kN)
      for (int64_t depth : kK) {
        const int64_t ldx = depth + 3, ldw = depth + 5, ldy = n + 2;  // also: no row is aligned
        const auto x = random_weights(m * ldx + 1, 1), w = random_weights(n * ldw + 1, 2),
                   y0 = random_weights(m * ldy + 1, 3);
        auto y = y0;
        k.gemm_nt(x.data() + 1, ldx, w.data() + 1, ldw, y.data(), ldy, m, n, depth);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < ldy; ++j) {
            const auto at = static_cast<size_t>(i * ldy + j);
            double sum = y0[at], magnitude = std::fabs(y0[at]);
            for (int64_t p = 0; j < n && p < depth; ++p) {
              const double product = double{x[static_cast<size_t>(1 + i * ldx + p)]} *
                                     w[static_cast<size_t>(1 + j * ldw + p)];
              sum += product;
              magnitude += std::fabs(product);
            }
            EXPECT_LE(std::fabs(y[at] - sum), j < n ? bound(depth, magnitude) : 0.0)
                << m << "x" << n << "x" << depth;
          }
        }
      }
}

TEST(Gemm, RowsTimesColumns) {
  const KernelTable& k = active_kernels();
  for (int64_t m : kM)
    for (int64_t n : kN)
      for (int64_t width : kK) {
        const int64_t ldg = n + 3, ldw = width + 5, ldy = width + 2;
        const auto g = random_weights(m * ldg + 1, 1), w = random_weights(n * ldw + 1, 2),
                   y0 = random_weights(m * ldy + 1, 3);
        auto y = y0;
        k.gemm_nn(g.data() + 1, ldg, w.data() + 1, ldw, y.data(), ldy, m, n, width);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t p = 0; p < ldy; ++p) {
            const auto at = static_cast<size_t>(i * ldy + p);
            double sum = y0[at], magnitude = std::fabs(y0[at]);
            for (int64_t j = 0; p < width && j < n; ++j) {
              const double product = double{g[static_cast<size_t>(1 + i * ldg + j)]} *
                                     w[static_cast<size_t>(1 + j * ldw + p)];
              sum += product;
              magnitude += std::fabs(product);
            }
            EXPECT_LE(std::fabs(y[at] - sum), p < width ? bound(16 * n, magnitude) : 0.0)
                << m << "x" << n << "x" << width;
          }
        }
      }
}

}  // namespace
}  // namespace bitfold
