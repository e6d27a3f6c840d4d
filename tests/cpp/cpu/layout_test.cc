// Weights in panels: what is decoded is the same bits as from rows, and so are products, but for
// those that rows take another walk for.
#include "core/layout.h"

#include "cpu/dequantize.h"
#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::InPanels;
using testing::Owned;
using testing::Values;

constexpr int64_t kRows[] = {16, 32, 48};
constexpr int64_t kCols[] = {64, 128, 192, 320, 1088};
constexpr int64_t kBatches[] = {1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 24, 25, 70};

std::vector<std::string> formats(const std::vector<std::string>& all) {
  std::vector<std::string> suit;
  for (const std::string& text : all)
    if (suits_panels(testing::format_of(text), 16, 64)) suit.push_back(text);
  return suit;
}

TEST(Layout, PanelsSuitWholeOnesWithOneCodebook) {
  const Format nf4 = testing::format_of("nf4");
  EXPECT_TRUE(suits_panels(nf4, 32, 128));
  EXPECT_FALSE(suits_panels(nf4, 40, 128));
  EXPECT_FALSE(suits_panels(nf4, 32, 96));
  EXPECT_FALSE(suits_panels(testing::format_of("kmeans4-row"), 32, 128));
  EXPECT_TRUE(suits_panels(testing::format_of("kmeans4-tensor"), 32, 128));
}

TEST(Layout, WhatIsDecodedIsTheSame) {
  const KernelTable& k = active_kernels();
  for (const std::string& text : formats(testing::every_format())) {
    for (int64_t cols : kCols) {
      Owned w(testing::format_of(text), 32, cols);
      w.fill_randomly(static_cast<unsigned>(cols));
      const InPanels panels(w.view());
      for (FloatType dtype : testing::kDtypes) {
        const auto decoded = [&](const PackedView& view) {
          return testing::written(dtype, view.rows * cols, [&](void* out) {
            dequantize(k, view, dtype, out, testing::run_in_threads);
          });
        };
        EXPECT_EQ(decoded(panels.view()), decoded(w.view())) << text << " " << cols;
        const int64_t indices[] = {31, 0, 17};
        const auto looked_up = [&](const PackedView& view) {
          return testing::written(dtype, 3 * cols, [&](void* out) {
            embedding(k, view, indices, 3, dtype, out, run_serially);
          });
        };
        EXPECT_EQ(looked_up(panels.view()), looked_up(w.view())) << text << " " << cols;
      }
    }
  }
}

TEST(Layout, Gradients) {
  const KernelTable& k = active_kernels();
  for (const std::string& text : formats(testing::some_formats())) {
    for (int64_t cols : {64, 1088, 2112}) {
      const int64_t rows = 80, m = 3;
      Owned w(testing::format_of(text), rows, cols);
      w.fill_randomly(5);
      const InPanels panels(w.view());
      const Values g(FloatType::kBFloat16, testing::random_weights(m * rows, 7));
      const auto gradient = [&](const PackedView& view) {
        return testing::written(g.dtype, m * cols, [&](void* gx) {
          linear_grad_input(k, view, g.data(), m, g.dtype, gx, testing::run_in_threads);
        });
      };
      EXPECT_EQ(gradient(panels.view()), gradient(w.view())) << text << " " << cols;
    }
  }
}

TEST(Layout, ProductsKeepTheirPromise) {
  const KernelTable& k = active_kernels();
  size_t turn = 0;
  for (const std::string& text : formats(testing::every_format())) {
    for (int64_t cols : kCols) {
      for (int64_t n : kRows) {
        Owned w(testing::format_of(text), n, cols);
        w.fill_randomly(static_cast<unsigned>(cols + n));
        const InPanels panels(w.view());
        const std::vector<float> decoded = w.decoded();
        const Values bias(FloatType::kFloat32, testing::random_weights(n, 3));
        for (Accuracy level : testing::kLevels) {
          // Few rows, which only panels take as panels, and another number each time.
          for (int64_t m : {1 + static_cast<int64_t>(turn % 4), kBatches[turn % 13]}) {
            const FloatType dtype = testing::kDtypes[turn / 4 % 3];
            const Values x(dtype, testing::random_weights(m * cols, 2));
            const Values of_dtype(dtype, bias.floats);
            const auto y = multiply(k, panels.view(), x, m, &of_dtype, level);
            testing::expect_product(w.view(), decoded, x, m, &of_dtype, y, level, text);
          }
          ++turn;
        }
      }
    }
  }
}

TEST(Layout, ProductsOfManyRowsAreTheSame) {
  const KernelTable& k = active_kernels();
  for (const std::string& text : formats(testing::some_formats())) {
    for (int64_t n : kRows) {
      const int64_t cols = 320;
      Owned w(testing::format_of(text), n, cols);
      w.fill_randomly(static_cast<unsigned>(n));
      const InPanels panels(w.view());
      std::vector<std::pair<int64_t, FloatType>> batches;
      for (int64_t m : kBatches) batches.emplace_back(m, FloatType::kFloat32);
      batches.emplace_back(70, FloatType::kBFloat16);  // integers are summed across groups
      for (const auto& [m, dtype] : batches) {
        const Values x(dtype, testing::random_weights(m * cols, 2));
        for (Accuracy level : testing::kLevels) {
          if (m <= k.walked_rows && level != Accuracy::kFp32) continue;
          const auto product = [&](const PackedView& view, const Parallel& parallel) {
            return multiply(k, view, x, m, nullptr, level, parallel);
          };
          const auto y = product(panels.view(), run_serially);
          EXPECT_EQ(y, product(w.view(), run_serially))
              << text << " " << testing::name_of(level) << " " << m << "x" << n;
          EXPECT_EQ(y, product(panels.view(), testing::run_in_threads)) << text << " " << m;
        }
      }
    }
  }
}

// What integers cannot stand for takes the float32 way there too.
TEST(Layout, NotFinite) {
  const KernelTable& k = active_kernels();
  const int64_t n = 16, cols = 128, m = 2;
  Owned w(testing::format_of("nf4"), n, cols);
  w.fill_randomly(1);
  const InPanels panels(w.view());
  std::vector<float> rows = testing::random_weights(m * cols, 2);
  rows[3] = NAN;
  const auto y =
      multiply(k, panels.view(), Values(FloatType::kFloat32, rows), m, nullptr, Accuracy::kAuto);
  for (int64_t r = 0; r < n; ++r) {
    EXPECT_TRUE(std::isnan(y[static_cast<size_t>(r)]));
    EXPECT_TRUE(std::isfinite(y[static_cast<size_t>(n + r)]));
  }
}

}  // namespace
}  // namespace bitfold
