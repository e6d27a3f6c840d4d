// Products in integers against their worst case, for shapes and formats that reach every path:
// whole and ragged blocks of a row, panels of fewer than sixteen rows, every tile of activations.
#include "cpu/integer_product.h"

#include <algorithm>

#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::check_product;
using testing::kDtypes;
using testing::kIntegerLevels;

constexpr int64_t kCols[] = {1, 15, 17, 63, 65, 129, 255, 257, 513, 1100};
constexpr int64_t kRows[] = {1, 15, 16, 17, 33};
constexpr int64_t kBatches[] = {0, 1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 24, 25};

TEST(IntegerProduct, EveryShape) {
  for (const char* text : {"nf4", "int4-g64", "int3-g16", "int8-row", "kmeans2-row"}) {
    for (int64_t cols : kCols)
      for (int64_t n : kRows)
        for (int64_t m : kBatches)
          for (Accuracy level : kIntegerLevels)
            check_product(active_kernels(), text, m, n, cols, FloatType::kFloat32, level);
  }
}

TEST(IntegerProduct, EveryFormatAndDtype) {
  size_t turn = 0;
  for (const std::string& text : testing::every_format()) {
    for (int64_t cols : kCols) {
      for (FloatType dtype : kDtypes) {
        for (Accuracy level : kIntegerLevels) {
          check_product(active_kernels(), text, 1, kRows[turn % 5], cols, dtype, level);
          check_product(active_kernels(), text, kBatches[turn % 13], kRows[turn % 5], cols, dtype,
                        level);
          ++turn;
        }
      }
    }
  }
}

// Many rows of bfloat16, whose integers are summed across groups: ends of spans, of slabs and of
// panels, groups of every size, and random bytes as scales, so that those of a span differ widely.
TEST(IntegerProduct, AcrossGroups) {
  size_t turn = 0;
  for (const std::string& text : testing::every_format()) {
    for (int64_t cols : {17, 80, 257, 640}) {
      check_product(active_kernels(), text, 64 + static_cast<int64_t>(turn % 3), kRows[turn % 5],
                    cols, FloatType::kBFloat16, Accuracy::kAuto, testing::run_in_threads);
      ++turn;
    }
  }
  for (const char* text : {"nf4", "int4-g64", "int3-g16", "int2-g32-zp-dq", "int8-g32", "int8-row"})
    check_product(active_kernels(), text, 100, 40, 1999, FloatType::kBFloat16, Accuracy::kAuto);
}

TEST(IntegerProduct, LongRows) {
  for (const char* text :
       {"nf4", "nf3-g16", "int4-g128-dq", "int3-g48-fz", "int2-row", "int8-tensor"}) {
    for (int64_t m : {1, 2, 3, 4, 6}) {
      for (Accuracy level : kIntegerLevels)
        check_product(active_kernels(), text, m, 19, 40011, FloatType::kFloat32, level);
    }
  }
}

// From two rows on, a row's result is its own in either walk: no other row, and no tile, changes a
// bit of it.
TEST(IntegerProduct, ARowIsTheSameInEveryBatch) {
  const KernelTable& k = active_kernels();
  const int64_t n = 18, cols = 330;
  for (const std::string& text : testing::some_formats()) {
    testing::Owned w(testing::format_of(text), n, cols);
    w.fill_randomly(3);
    const std::vector<float> rows = testing::random_weights(25 * cols, 4);
    for (Accuracy level : kIntegerLevels) {
      // The last m rows, so that most of them move to another place in a tile.
      const auto product_of_last = [&](int64_t m) {
        const testing::Values some(FloatType::kFloat32, {rows.end() - m * cols, rows.end()});
        return multiply(k, w.view(), some, m, nullptr, level);
      };
      const std::vector<float> walked = product_of_last(std::max<int64_t>(k.walked_rows, 2));
      const std::vector<float> tiled = product_of_last(25);
      for (int64_t m : kBatches) {
        if (m < 2) continue;
        const std::vector<float>& all = m <= k.walked_rows ? walked : tiled;
        const std::vector<float> part = product_of_last(m);
        EXPECT_EQ(memcmp(part.data(), &*(all.end() - m * n), part.size() * 4), 0)
            << text << " " << testing::name_of(level) << " m " << m;
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
