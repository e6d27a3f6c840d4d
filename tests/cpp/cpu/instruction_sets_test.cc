// All instruction sets that this machine has, in one process: the same codes, scales and decoded
// weights, bit for bit.
#include "support.h"

namespace bitfold {
namespace {

using testing::format_of;
using testing::Owned;

std::vector<const InstructionSet*> wide_sets() {
  std::vector<const InstructionSet*> sets;
  for (const InstructionSet& isa : instruction_sets()) {
    if (isa.supported() && isa.table != &portable::table) sets.push_back(&isa);
  }
  return sets;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST(InstructionSets, QuantizeToTheSameBytes) {
  for (const std::string& text : testing::every_format()) {
    const Format format = format_of(text);
    for (int64_t cols : {1, 17, 197}) {
      const int64_t rows = 3;
      const std::vector<float> w =
          testing::random_weights(rows * cols, 7, testing::Shape::kOutliers, 0.02f);
      for (Method method : {Method::kRound, Method::kSearch}) {
        Owned base(format, rows, cols);
        ASSERT_TRUE(base.quantize(portable::table, method, w).ok());
        for (const InstructionSet* isa : wide_sets()) {
          Owned other(format, rows, cols);
          ASSERT_TRUE(other.quantize(*isa->table, method, w).ok());
          EXPECT_EQ(other.bytes(), base.bytes())
              << text << " " << isa->name << " cols " << cols << " method " << int(method);
        }
      }
    }
  }
}

TEST(InstructionSets, DecodeToTheSameFloats) {
  for (const std::string& text : testing::every_format()) {
    const int64_t rows = 3, cols = 213;
    Owned w(format_of(text), rows, cols);
    w.fill_randomly(8);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<float> base(static_cast<size_t>(cols)), other(base.size());
      portable::table.decode(w.view(), r, 0, cols, base.data());
      for (const InstructionSet* isa : wide_sets()) {
        isa->table->decode(w.view(), r, 0, cols, other.data());
        EXPECT_TRUE(same_bits(base, other)) << text << " " << isa->name;
      }
    }
  }
}

TEST(InstructionSets, StatisticsAndFitsAreTheSameBits) {
  for (int64_t n : {1, 2, 15, 16, 17, 63, 64, 65, 300}) {
    std::vector<float> w =
        testing::random_weights(n, static_cast<unsigned>(n), testing::Shape::kOutliers);
    const SpanStats base = portable::table.stats(w.data(), n);
    for (const InstructionSet* isa : wide_sets()) {
      const SpanStats other = isa->table->stats(w.data(), n);
      EXPECT_EQ(other.min, base.min);
      EXPECT_EQ(other.max, base.max);
      EXPECT_EQ(other.sum, base.sum);
      EXPECT_EQ(other.finite, base.finite);
      const auto equal = [](const SpanFit& a, const SpanFit& b) {
        return a.wd == b.wd && a.dd == b.dd && a.d == b.d;
      };
      for (float scale : {0.1f, 0.37f, 1e-30f, 5.0f}) {
        for (float top : {3.0f, 7.0f, 15.0f, 255.0f}) {
          const Grid grid{scale, top / 2, top};
          EXPECT_TRUE(equal(isa->table->fit_grid(w.data(), n, grid),
                            portable::table.fit_grid(w.data(), n, grid)));
          EXPECT_EQ(isa->table->error_grid(w.data(), n, grid),
                    portable::table.error_grid(w.data(), n, grid));
        }
        for (const Codebook* book : {&kNf4, &kNf3, &kNf2, &kFp4, &kLog4}) {
          EXPECT_TRUE(equal(isa->table->fit_codebook(w.data(), n, scale, *book),
                            portable::table.fit_codebook(w.data(), n, scale, *book)));
          EXPECT_EQ(isa->table->error_codebook(w.data(), n, scale, *book),
                    portable::table.error_codebook(w.data(), n, scale, *book));
        }
      }
    }
  }
}

TEST(InstructionSets, ConvertHalvesAlike) {
  std::vector<uint16_t> bits(65536 + 7);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  const auto n = static_cast<int64_t>(bits.size());
  std::vector<float> floats = testing::random_weights(4099, 9, testing::Shape::kLaplace);
  for (float extreme : {0.0f, -0.0f, 65504.0f, 65519.9f, 65520.0f, 1e38f, -1e-8f, 3e-8f, 1e-45f,
                        INFINITY, -INFINITY}) {
    floats.push_back(extreme);
  }
  for (FloatType dtype : {FloatType::kFloat16, FloatType::kBFloat16}) {
    std::vector<float> base(bits.size()), other(bits.size());
    std::vector<uint16_t> base_bits(floats.size()), other_bits(floats.size());
    portable::table.to_float(bits.data(), dtype, n, base.data());
    portable::table.from_float(floats.data(), static_cast<int64_t>(floats.size()), dtype,
                               base_bits.data());
    for (const InstructionSet* isa : wide_sets()) {
      isa->table->to_float(bits.data(), dtype, n, other.data());
      for (size_t i = 0; i < bits.size(); ++i) {
        if (std::isnan(base[i])) {
          EXPECT_TRUE(std::isnan(other[i]));
        } else {
          EXPECT_EQ(bits_from_float(base[i]), bits_from_float(other[i])) << isa->name << " " << i;
        }
      }
      isa->table->from_float(floats.data(), static_cast<int64_t>(floats.size()), dtype,
                             other_bits.data());
      EXPECT_EQ(base_bits, other_bits) << isa->name;
    }
  }
}

}  // namespace
}  // namespace bitfold
