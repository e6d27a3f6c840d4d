// float32 products and gradients, and what holds at every level: threads, batches, no bias.
#include "cpu/linear.h"

#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::check_product;
using testing::format_of;
using testing::kDtypes;
using testing::kLevels;
using testing::kRound;
using testing::Owned;
using testing::random_weights;
using testing::Values;

struct Case {
  int64_t m, n, k;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int64_t m : {0, 1, 2, 7, 16, 33}) {
    for (int64_t k : {1, 15, 16, 17, 63, 64, 65, 197, 512, 513}) all.push_back({m, 13, k});
  }
  for (int64_t n : {1, 63, 64, 65, 131})
    all.push_back({5, n, 530}), all.push_back({1, n, 1100}), all.push_back({17, n, 33});
  return all;
}

TEST(Linear, EveryShapeInFloats) {
  for (const char* text : {"nf4", "int4-g64", "int3-g16", "int2-g128", "int8-row", "kmeans4-row"}) {
    for (const Case& c : cases()) {
      check_product(active_kernels(), text, c.m, c.n, c.k, FloatType::kFloat32, Accuracy::kFp32);
    }
  }
}

TEST(Linear, EveryFormatAndDtypeInFloats) {
  for (const std::string& text : testing::every_format()) {
    for (FloatType dtype : kDtypes)
      check_product(active_kernels(), text, 3, 9, 197, dtype, Accuracy::kFp32);
  }
}

TEST(Linear, HugeBatchesAreCutInPieces) {
  for (Accuracy level : kLevels) {
    check_product(active_kernels(), "nf4", 513, 5, 17, FloatType::kFloat32,
                  level);  // the last: one row
    check_product(active_kernels(), "int4-g64", 1030, 5, 17, FloatType::kFloat16, level,
                  testing::run_in_threads);
  }
}

// Every item on its own, the last one first.
void run_backwards(int64_t n, int64_t /*grain*/, const RangeBody& body) {
  for (int64_t i = n - 1; i >= 0; --i) body(i, i + 1);
}

TEST(Linear, TheSameBitsHoweverWorkIsSplit) {
  const KernelTable& k = active_kernels();
  std::vector<std::pair<std::string, int64_t>> cases;
  for (const std::string& text : testing::some_formats()) cases.emplace_back(text, 300);
  // Groups that fill whole vectors, and are decoded as they lie.
  for (const char* text : {"nf4", "int4-g64", "int3-g64-dq"}) cases.emplace_back(text, 1024);
  for (const auto& [text, cols] : cases) {
    Owned w(format_of(text), 70, cols);
    w.fill_randomly(1);
    for (int64_t m : {1, 2, 5, 13}) {
      for (FloatType dtype : {FloatType::kFloat32, FloatType::kBFloat16}) {
        const Values x(dtype, random_weights(m * cols, 2)), bias(dtype, random_weights(70, 3));
        for (Accuracy level : kLevels) {
          const auto y = multiply(k, w.view(), x, m, &bias, level);
          for (const Parallel& parallel :
               {Parallel(testing::run_in_threads), Parallel(run_backwards)}) {
            const auto other = multiply(k, w.view(), x, m, &bias, level, parallel);
            EXPECT_EQ(memcmp(y.data(), other.data(), y.size() * 4), 0)
                << text << " " << cols << " " << testing::name_of(level) << " m " << m;
          }
        }
      }
    }
  }
}

TEST(Linear, NoBias) {
  for (const char* text : {"nf4", "int4-g64", "int8-row"}) {
    Owned w(format_of(text), 19, 70);
    w.fill_randomly(1);
    for (int64_t m : {1, 3}) {
      for (Accuracy level : kLevels) {
        const Values x(FloatType::kFloat32, random_weights(m * 70, 2));
        const auto y = multiply(active_kernels(), w.view(), x, m, nullptr, level);
        expect_product(w.view(), w.decoded(), x, m, nullptr, y, level, text);
      }
    }
  }
}

TEST(GradInput, AgainstTheReference) {
  const KernelTable& k = active_kernels();
  for (const std::string& text : testing::some_formats()) {
    for (const Case& c : std::vector<Case>{
             {0, 3, 5}, {1, 13, 197}, {7, 65, 130}, {33, 7, 17}, {2, 3, 2100}, {1030, 2, 3}}) {
      Owned w(format_of(text), c.n, c.k);
      w.fill_randomly(4);
      const std::vector<float> weight = w.decoded(), g = random_weights(c.m * c.n, 5);
      std::vector<float> gx(static_cast<size_t>(c.m * c.k) + 1, 99.0f);
      linear_grad_input(k, w.view(), g.data(), c.m, FloatType::kFloat32, gx.data(),
                        testing::run_in_threads);
      EXPECT_EQ(gx.back(), 99.0f);
      for (int64_t i = 0; i < c.m; ++i) {
        for (int64_t p = 0; p < c.k; ++p) {
          double sum = 0.0, magnitude = 0.0;
          for (int64_t r = 0; r < c.n; ++r) {
            const double product = double{g[static_cast<size_t>(i * c.n + r)]} *
                                   weight[static_cast<size_t>(r * c.k + p)];
            sum += product;
            magnitude += std::fabs(product);
          }
          EXPECT_LE(std::fabs(gx[static_cast<size_t>(i * c.k + p)] - sum),
                    (static_cast<double>(c.n) + 20.0) * kRound * magnitude)
              << text << " " << c.m << "x" << c.n << "x" << c.k;
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
