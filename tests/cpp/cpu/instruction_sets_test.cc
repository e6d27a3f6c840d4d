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

TEST(InstructionSets, StatisticsChoicesAndFitsAreTheSameBits) {
  const std::vector<Encoding> encodings = {
      {8, Zero::kNone, nullptr},    {4, Zero::kInt, nullptr}, {3, Zero::kFloat, nullptr},
      {2, Zero::kMidrise, nullptr}, {4, Zero::kNone, &kNf4},  {3, Zero::kNone, &kNf3},
      {2, Zero::kNone, &kNf2},      {4, Zero::kNone, &kFp4},  {4, Zero::kNone, &kLog4}};
  for (int64_t n : {1, 2, 15, 16, 17, 63, 64, 65, 300}) {
    std::vector<float> w =
        testing::random_weights(n, static_cast<unsigned>(n), testing::Shape::kOutliers);
    float base[2], other[2];
    portable::table.stats(w.data(), n, n, &base[0], &base[1]);
    for (const InstructionSet* isa : wide_sets()) {
      isa->table->stats(w.data(), n, n, &other[0], &other[1]);
      EXPECT_EQ(other[0], base[0]);
      EXPECT_EQ(other[1], base[1]);
    }
    std::vector<const float*> spans(16, w.data());
    std::vector<float> block(static_cast<size_t>(16 * n));
    portable::table.interleave(spans.data(), n, block.data());
    for (const Encoding& encoding : encodings) {
      constexpr int kCount = 16;
      float low[kCount], high[kCount], shrink[kCount];
      for (int i = 0; i < kCount; ++i) {
        low[i] = base[0];
        high[i] = base[1];
        shrink[i] = 1.0f - 0.05f * static_cast<float>(i);
      }
      float scale[2][kCount], zero[2][kCount], errors[2][kCount];
      SpanFits fits[2];
      const auto run = [&](const KernelTable& k, int to) {
        k.choices(encoding, kCount, low, high, shrink, shrink, scale[to], zero[to]);
        k.errors(encoding, block.data(), n, 1, scale[to], zero[to], errors[to]);
        fits[to] = {};
        k.fit(encoding, block.data(), n, scale[to], zero[to], &fits[to]);
      };
      run(portable::table, 0);
      for (const InstructionSet* isa : wide_sets()) {
        run(*isa->table, 1);
        for (int i = 0; i < kCount; ++i) {
          EXPECT_EQ(scale[1][i], scale[0][i]) << isa->name;
          EXPECT_EQ(zero[1][i], zero[0][i]) << isa->name;
          EXPECT_EQ(errors[1][i], errors[0][i]) << isa->name;
          EXPECT_EQ(fits[1].error[i], fits[0].error[i]) << isa->name;
          EXPECT_EQ(fits[1].wd[i], fits[0].wd[i]) << isa->name;
          EXPECT_EQ(fits[1].dd[i], fits[0].dd[i]) << isa->name;
          EXPECT_EQ(fits[1].w[i], fits[0].w[i]) << isa->name;
          EXPECT_EQ(fits[1].d[i], fits[0].d[i]) << isa->name;
        }
      }
    }
  }
}

TEST(InstructionSets, ActivationsBecomeTheSameIntegers) {
  const int64_t cols = 300;
  const std::vector<float> x = testing::random_weights(cols, 10, testing::Shape::kOutliers);
  for (const char* text : {"nf4", "int4-g16", "int3-g48", "int8-row"}) {
    Owned w(format_of(text), 1, cols);
    for (Operand operand : {Operand::kWords, Operand::kTwoBytes, Operand::kBytes}) {
      for (int kind : {0, 1, 2}) {
        const Walk walk = kind ? Walk::kPanels : Walk::kRows;
        const auto integers = [&](const KernelTable& k) {
          Activations to = describe_activations(w.view(), operand, walk, 1, kind == 2);
          std::vector<uint8_t> data(static_cast<size_t>(to.blocks * to.layout->block_bytes));
          std::vector<float> scale(static_cast<size_t>(to.units)), sum(scale);
          to.data = data.data();
          to.scale = scale.data();
          to.sum = sum.data();
          std::vector<uint8_t> shared(scale.size(), 1);
          if (kind == 2) to.shared = shared.data();
          EXPECT_TRUE(k.quantize_activations(x.data(), FloatType::kFloat32, 0, &to));
          for (const std::vector<float>* floats : {&scale, &sum}) {
            const auto* bytes = reinterpret_cast<const uint8_t*>(floats->data());
            data.insert(data.end(), bytes, bytes + 4 * floats->size());
          }
          return data;
        };
        const std::vector<uint8_t> base = integers(portable::table);
        for (const InstructionSet* isa : wide_sets())
          EXPECT_EQ(integers(*isa->table), base) << text << " " << isa->name;
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
