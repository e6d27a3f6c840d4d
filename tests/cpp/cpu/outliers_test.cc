// Sparse values beside the codes: what is decoded and multiplied with them, and bytes that lie.
#include "cpu/outliers.h"

#include "cpu/dequantize.h"
#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::Owned;
using testing::random_weights;
using testing::Values;

const char* const kFormats[] = {"int3-g64-outliers", "nf4-outliers100", "int8-outliers50",
                                "kmeans2-outliers"};

TEST(Outliers, AreAddedToWhatTheCodesStandFor) {
  Owned w(format_of("int4-g16-outliers"), 2, 100);
  w.fill_randomly(1);
  auto* row = reinterpret_cast<int32_t*>(w.buffer(BufferRole::kOutlierRow));
  auto* column = reinterpret_cast<uint16_t*>(w.buffer(BufferRole::kOutlierColumn));
  auto* value = reinterpret_cast<uint16_t*>(w.buffer(BufferRole::kOutlierValue));
  row[0] = row[1] = 0, row[2] = 2;
  column[0] = 3, column[1] = 99;
  value[0] = float_to_half(1.5f), value[1] = float_to_half(-0.25f);
  *w.buffer(BufferRole::kOutlierExponent) = static_cast<uint8_t>(-2);
  PackedView dense = w.view();
  dense.outliers = {};
  std::vector<float> codes(200), all(200);
  dequantize(active_kernels(), dense, FloatType::kFloat32, codes.data(), run_serially);
  dequantize(active_kernels(), w.view(), FloatType::kFloat32, all.data(), run_serially);
  codes[103] += 0.375f;
  codes[199] += -0.0625f;
  EXPECT_EQ(all, codes);
}

TEST(Outliers, DecodedAsTheReferenceDoes) {
  for (const char* text : kFormats) {
    for (int64_t cols : {1, 17, 197, 70000}) {
      Owned w(format_of(text), 3, cols);
      w.fill_randomly(static_cast<unsigned>(cols));
      std::vector<float> got(static_cast<size_t>(3 * cols));
      std::vector<uint16_t> halves(got.size());
      const std::vector<float> expected = w.decoded();
      dequantize(active_kernels(), w.view(), FloatType::kFloat32, got.data(), run_serially);
      dequantize(active_kernels(), w.view(), FloatType::kFloat16, halves.data(), run_serially);
      EXPECT_EQ(got, expected) << text << " " << cols;
      EXPECT_EQ(halves, testing::to_bits16(expected, FloatType::kFloat16)) << text << " " << cols;
      const int64_t indices[] = {2, 0, 2};
      embedding(active_kernels(), w.view(), indices, 3, FloatType::kFloat32, got.data(),
                testing::run_in_threads);
      for (int64_t i = 0; i < 3; ++i)
        EXPECT_EQ(memcmp(&got[static_cast<size_t>(i * cols)],
                         &expected[static_cast<size_t>(indices[i] * cols)],
                         static_cast<size_t>(cols) * 4),
                  0);
    }
  }
}

TEST(Outliers, ProductsOfEveryLevelAndDtype) {
  for (const char* text : kFormats) {
    for (FloatType dtype : testing::kDtypes) {
      for (Accuracy level : testing::kLevels) {
        for (int64_t m : {1, 2, 17}) {
          testing::check_product(active_kernels(), text, m, 37, 197, dtype, level);
          testing::check_product(active_kernels(), text, m, 19, 600, dtype, level,
                                 testing::run_in_threads);
        }
      }
    }
    testing::check_product(active_kernels(), text, 1, 2, 70000, FloatType::kFloat32,
                           Accuracy::kAuto);
  }
}

TEST(Outliers, GradientsSeeThem) {
  Owned w(format_of("int4-outliers100"), 5, 70);
  w.fill_randomly(1);
  std::vector<float> eye(25), got(350);
  for (size_t i = 0; i < 5; ++i) eye[6 * i] = 1.0f;
  linear_grad_input(active_kernels(), w.view(), eye.data(), 5, FloatType::kFloat32, got.data(),
                    run_serially);
  EXPECT_EQ(got, w.decoded());
}

TEST(Outliers, BytesThatLieStayWithinTheBuffers) {
  const KernelTable& k = active_kernels();
  for (const char* text : kFormats) {
    for (int64_t cols : {70, 70000}) {
      for (unsigned seed = 0; seed < 10; ++seed) {
        Owned w(format_of(text), 9, cols);
        w.fill_randomly(seed);
        std::mt19937 rng(seed);
        const int64_t count = w.format().outlier_count(9, cols);
        auto* row = reinterpret_cast<int32_t*>(w.buffer(BufferRole::kOutlierRow));
        for (int i = 0; i < 10; ++i)
          row[i] = rng() % 2 ? static_cast<int32_t>(rng())
                             : static_cast<int32_t>(rng() % (static_cast<unsigned>(count) + 1));
        uint8_t* column = w.buffer(BufferRole::kOutlierColumn);
        for (int64_t i = 0; i < count * (cols <= kMaxShortColumns ? 2 : 4); ++i)
          column[i] = static_cast<uint8_t>(rng());
        std::vector<float> got(static_cast<size_t>(9 * cols));
        dequantize(k, w.view(), FloatType::kFloat32, got.data(), run_serially);
        EXPECT_EQ(got, w.decoded());
        const Values x(FloatType::kFloat32, random_weights(3 * cols, 1));
        for (Accuracy level : testing::kLevels) {
          multiply(k, w.view(), x, 3, nullptr, level);
          multiply(k, w.view(), Values(x.dtype, {x.floats.begin(), x.floats.begin() + cols}), 1,
                   nullptr, level);
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitfold
