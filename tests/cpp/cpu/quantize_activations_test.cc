// Floats to integers: each within half a step, the sums beside them exact, and a refusal where
// integers cannot stand for a value.
#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::Owned;
using testing::random_weights;
using testing::Values;

// An owner of what describe_activations leaves null.
struct Quantized {
  Activations x;
  std::vector<uint8_t> data;
  std::vector<float> scale, sum;
  std::vector<uint8_t> shared;

  Quantized(const PackedView& w, Operand operand, Walk walk, int64_t rows,
            bool across_groups = false)
      : x(describe_activations(w, operand, walk, rows, across_groups)),
        data(static_cast<size_t>(x.blocks * rows * x.layout->block_bytes), 0xee),
        scale(static_cast<size_t>(rows * x.units), -1.0f),
        sum(scale),
        shared(static_cast<size_t>(x.units), 1) {
    x.shared = across_groups ? shared.data() : nullptr;
    x.data = data.data();
    x.scale = scale.data();
    x.sum = sum.data();
  }
  Quantized(const Quantized&) = delete;

  // Of the i-th element of a block. In the walk over rows vectors of sixteen lanes follow each
  // other; lane after lane gives the order of the slabs.
  static int64_t column_of(const ActivationLayout& layout, int64_t i) {
    int64_t at = i;
    if (layout.turned) {
      const int64_t elements = layout.operand == Operand::kWords ? 2 : 4;
      const int64_t vector = i / (16 * elements), lane = i / elements % 16;
      at = layout.first_col_of_lane[lane] + vector * elements + i % elements;
    }
    return at / 64 * 64 + layout.order[at % 64];
  }

  // q of every column of row m, those beyond the last one too.
  std::vector<int> integers(int64_t m) const {
    const ActivationLayout& layout = *x.layout;
    std::vector<int> q(static_cast<size_t>(x.blocks * layout.block_cols));
    for (int64_t b = 0; b < x.blocks; ++b) {
      const uint8_t* from = x.data + (b * x.rows + m) * layout.block_bytes;
      for (int64_t i = 0; i < layout.block_cols; ++i) {
        int value = 0;
        if (layout.operand == Operand::kWords) {
          int16_t word;
          memcpy(&word, from + 2 * i, 2);
          value = word;
        } else if (layout.operand == Operand::kBytes) {
          value = static_cast<int8_t>(from[i]);
        } else {  // 64 high bytes, 64 low ones
          const uint8_t* high = from + i / 64 * 128 + i % 64;
          value = 256 * static_cast<int8_t>(high[0]) + static_cast<int8_t>(high[64]);
        }
        q[static_cast<size_t>(b * layout.block_cols + column_of(layout, i))] = value;
      }
    }
    return q;
  }
};

void check_row(const Quantized& to, int64_t m, const float* x, const std::string& what) {
  const Activations& a = to.x;
  const std::vector<int> q = to.integers(m);
  double absmax = 0.0, size = 0.0, integer_size = 0.0;  // of a span
  for (int64_t u = 0; u < a.units; ++u) {
    const bool begins = u * a.unit % a.span == 0, ends = (u + 1) * a.unit % a.span == 0;
    if (begins) absmax = size = integer_size = 0.0;
    double sum = 0.0;
    const float scale = a.scale[m * a.units + u];
    for (int64_t c = u * a.unit; c < (u + 1) * a.unit && c < a.blocks * a.layout->block_cols; ++c) {
      const double value = c < a.cols ? x[c] : 0.0;
      const int got = q[static_cast<size_t>(c)];
      absmax = std::max(absmax, std::fabs(value));
      size += std::fabs(value);
      sum += got;
      integer_size += std::abs(got);
      EXPECT_LE(std::abs(got), static_cast<int>(a.limit)) << what;
      EXPECT_LE(std::fabs(value - double{scale} * got),
                scale * (0.5 + 3.0 * double{a.limit} * testing::kRound))
          << what << " column " << c;
    }
    const double step = std::max(absmax / a.limit, size / a.sum_limit);
    if (ends) {
      EXPECT_NEAR(scale, step, step * 1e-6) << what << " unit " << u;
    }
    if (!begins) {
      EXPECT_EQ(scale, a.scale[m * a.units + u - 1]) << what << " unit " << u;
    }
    EXPECT_NEAR(a.sum[m * a.units + u], scale * sum,
                std::fabs(scale * sum) * 1.01 * testing::kRound)
        << what << " unit " << u;
    EXPECT_TRUE(std::isinf(a.sum_limit) || integer_size * kLevelLimit <= INT32_MAX) << what;
  }
}

TEST(QuantizeActivations, WithinHalfAStep) {
  const KernelTable& k = active_kernels();
  const int64_t rows = 3;
  for (const char* text :
       {"nf4", "nf3-g16", "nf2-g48", "int8-row", "int4-g32", "int3-g64", "int2-g128"}) {
    for (int64_t cols : {1, 16, 63, 65, 300}) {
      Owned w(format_of(text), 1, cols);
      for (Operand operand : {Operand::kWords, Operand::kTwoBytes, Operand::kBytes}) {
        for (Walk walk : {Walk::kRows, Walk::kPanels}) {
          for (FloatType dtype : testing::kDtypes) {
            const Values x(dtype, random_weights(rows * cols, 5, testing::Shape::kOutliers));
            Quantized to(w.view(), operand, walk, rows);
            for (int64_t m = 0; m < rows; ++m) {
              ASSERT_TRUE(
                  k.quantize_activations(advance(x.data(), dtype, m * cols), dtype, m, &to.x));
            }
            for (int64_t m = 0; m < rows; ++m)
              check_row(to, m, x.floats.data() + m * cols,
                        std::string(text) + " " + std::to_string(cols));
          }
        }
      }
    }
  }
}

TEST(QuantizeActivations, SpansOfSeveralUnits) {
  const KernelTable& k = active_kernels();
  for (const char* text : {"nf4", "nf4-g16", "int8-row", "int4-g32", "int3-g64", "int8-g16"}) {
    for (int64_t cols : {1, 63, 65, 300, 1300}) {
      Owned w(format_of(text), 1, cols);
      const Values x(FloatType::kBFloat16, random_weights(2 * cols, 5, testing::Shape::kOutliers));
      Quantized to(w.view(), Operand::kWords, Walk::kPanels, 2, /*across_groups=*/true);
      for (int64_t m = 0; m < 2; ++m)
        ASSERT_TRUE(
            k.quantize_activations(advance(x.data(), x.dtype, m * cols), x.dtype, m, &to.x));
      for (int64_t m = 0; m < 2; ++m)
        check_row(to, m, x.floats.data() + m * cols,
                  std::string(text) + " " + std::to_string(cols));
    }
  }
}

TEST(QuantizeActivations, EndsOfTheRange) {
  const KernelTable& k = active_kernels();
  Owned w(format_of("nf4"), 1, 128);
  for (float size : {0.0f, 1.01e-25f, 1e-20f, 1.0f, 1e20f, 1e28f}) {
    for (bool alike : {false, true}) {
      std::vector<float> x = random_weights(128, 6, testing::Shape::kUniform, size);
      if (alike) std::fill(x.begin(), x.end(), size);
      x[0] = x[64] = size;
      for (Operand operand : {Operand::kWords, Operand::kTwoBytes, Operand::kBytes}) {
        Quantized to(w.view(), operand, Walk::kRows, 1);
        ASSERT_TRUE(k.quantize_activations(x.data(), FloatType::kFloat32, 0, &to.x)) << size;
        check_row(to, 0, x.data(), "size " + std::to_string(size));
      }
    }
  }
}

TEST(QuantizeActivations, RefusesWhatIntegersCannotStandFor) {
  const KernelTable& k = active_kernels();
  Owned w(format_of("nf4"), 1, 200);
  for (float value : {NAN, INFINITY, -INFINITY, 1e38f, -2e30f}) {
    for (int64_t at : {0, 63, 64, 199}) {
      std::vector<float> x = random_weights(200, 7);
      x[static_cast<size_t>(at)] = value;
      Quantized to(w.view(), Operand::kWords, Walk::kRows, 1);
      EXPECT_FALSE(k.quantize_activations(x.data(), FloatType::kFloat32, 0, &to.x)) << value;
      Quantized spans(w.view(), Operand::kWords, Walk::kPanels, 1, /*across_groups=*/true);
      EXPECT_FALSE(k.quantize_activations(x.data(), FloatType::kFloat32, 0, &spans.x)) << value;
    }
  }
  for (float value : {1e-26f, 1e-40f, 1e-45f}) {
    std::vector<float> x = random_weights(200, 8);
    std::fill(x.begin() + 64, x.begin() + 128, 0.0f);
    x[100] = value;  // the only one of its unit
    Quantized to(w.view(), Operand::kWords, Walk::kRows, 1);
    EXPECT_FALSE(k.quantize_activations(x.data(), FloatType::kFloat32, 0, &to.x)) << value;
    x[101] = 1.0f;
    EXPECT_TRUE(k.quantize_activations(x.data(), FloatType::kFloat32, 0, &to.x)) << value;
  }
}

}  // namespace
}  // namespace bitfold
