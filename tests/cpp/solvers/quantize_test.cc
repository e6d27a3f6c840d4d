#include "solvers/quantize.h"

#include "core/bitpack.h"
#include "support.h"

namespace bitfold {
namespace {

using testing::format_of;
using testing::Owned;
using testing::random_weights;

const KernelTable& best() {
  Status status;
  return *active_instruction_set(&status)->table;
}

constexpr Method kMethods[] = {Method::kRound, Method::kSearch};

// |w - decoded| of every weight can be bounded by the step of its group and by clipping; a loose
// bound that catches a wrong scale, zero point or group.
TEST(Quantize, EveryFormatAndRaggedShapeComesBack) {
  for (const std::string& text : testing::every_format()) {
    const Format format = format_of(text);
    const double budget = format.bits() == 8   ? 1e-3
                          : format.bits() == 4 ? 0.06
                          : format.bits() == 3 ? 0.2
                                               : 0.45;
    for (const auto& [rows, cols] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {5, 3}, {2, 17}, {3, 64}, {7, 197}}) {
      const std::vector<float> w = random_weights(rows * cols, 11, testing::Shape::kUniform, 0.02f);
      Owned packed(format, rows, cols);
      ASSERT_TRUE(packed.quantize(best(), Method::kSearch, w).ok());
      const double energy = testing::squared_error(w, std::vector<float>(w.size()));
      EXPECT_LE(testing::squared_error(w, packed.decoded()), budget * energy)
          << text << " " << rows << "x" << cols;
    }
  }
}

TEST(Quantize, SearchIsNeverWorseThanRound) {
  for (const std::string& text : testing::every_format()) {
    const Format format = format_of(text);
    if (format.family() == Family::kLearnedCodebook) continue;
    for (auto shape : {testing::Shape::kGaussian, testing::Shape::kUniform,
                       testing::Shape::kLaplace, testing::Shape::kOutliers}) {
      const std::vector<float> w = random_weights(5 * 197, 12, shape, 0.02f);
      Owned round(format, 5, 197), search(format, 5, 197);
      ASSERT_TRUE(round.quantize(best(), Method::kRound, w).ok());
      ASSERT_TRUE(search.quantize(best(), Method::kSearch, w).ok());
      // Both choose among real scales and are then stored in fp16 or 8-bit codes, which moves the
      // error of each: for 8-bit weights the error of an 8-bit scale is no smaller than that of the
      // weights.
      const double slack = !format.double_quant ? 1.005 : format.bits() == 8 ? 1.2 : 1.05;
      EXPECT_LE(testing::squared_error(w, search.decoded()),
                slack * testing::squared_error(w, round.decoded()))
          << text << " " << int(shape);
    }
  }
}

TEST(Quantize, AnyStrideReadsTheSameWeights) {
  const int64_t rows = 5, cols = 70;
  const std::vector<float> w = random_weights(rows * cols, 13);
  for (const std::string& text : testing::some_formats()) {
    const Format format = format_of(text);
    Owned dense(format, rows, cols);
    ASSERT_TRUE(dense.quantize(best(), Method::kSearch, w).ok());
    std::vector<float> padded(static_cast<size_t>(rows * 91 + 1), NAN), transposed(w.size()),
        spaced(w.size() * 3, NAN), backward(w);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const float v = w[static_cast<size_t>(r * cols + c)];
        padded[static_cast<size_t>(1 + r * 91 + c)] = v;
        transposed[static_cast<size_t>(c * rows + r)] = v;
        spaced[static_cast<size_t>(3 * (r * cols + c))] = v;
        backward[static_cast<size_t>((rows - 1 - r) * cols + c)] = v;
      }
    }
    const MatrixView views[] = {
        {padded.data() + 1, FloatType::kFloat32, rows, cols, 91, 1},
        {transposed.data(), FloatType::kFloat32, rows, cols, 1, rows},
        {spaced.data(), FloatType::kFloat32, rows, cols, 3 * cols, 3},
        {backward.data() + (rows - 1) * cols, FloatType::kFloat32, rows, cols, -cols, 1}};
    for (const MatrixView& view : views) {
      Owned other(format, rows, cols);
      ASSERT_TRUE(other.quantize(best(), Method::kSearch, view).ok());
      EXPECT_EQ(other.bytes(), dense.bytes())
          << text << " strides " << view.row_stride << ", " << view.col_stride;
    }
  }
}

TEST(Quantize, NarrowFloatsEqualTheirWidenedSelves) {
  const int64_t rows = 3, cols = 83;
  const std::vector<float> w = random_weights(rows * cols, 14);
  for (FloatType dtype : {FloatType::kFloat16, FloatType::kBFloat16}) {
    const std::vector<uint16_t> bits = testing::to_bits16(w, dtype);
    std::vector<float> widened(w.size());
    std::vector<uint16_t> transposed(w.size());
    for (size_t i = 0; i < w.size(); ++i) {
      widened[i] = testing::from_bits16(bits[i], dtype);
      transposed[i % cols * rows + i / cols] = bits[i];
    }
    for (const std::string& text : testing::some_formats()) {
      Owned narrow(format_of(text), rows, cols), strided(format_of(text), rows, cols),
          wide(format_of(text), rows, cols);
      ASSERT_TRUE(narrow
                      .quantize(best(), Method::kSearch,
                                MatrixView{bits.data(), dtype, rows, cols, cols, 1})
                      .ok());
      ASSERT_TRUE(strided
                      .quantize(best(), Method::kSearch,
                                MatrixView{transposed.data(), dtype, rows, cols, 1, rows})
                      .ok());
      ASSERT_TRUE(wide.quantize(best(), Method::kSearch, widened).ok());
      EXPECT_EQ(narrow.bytes(), wide.bytes()) << text;
      EXPECT_EQ(strided.bytes(), wide.bytes()) << text;
    }
  }
}

TEST(Quantize, NonFiniteWeightsAreReportedWithTheFirstPlace) {
  for (const std::string& text : testing::some_formats()) {
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> w = random_weights(6 * 70, 15);
      w[static_cast<size_t>(2 * 70 + 69)] = bad;
      w[static_cast<size_t>(4 * 70)] = bad;
      for (Method method : kMethods) {
        for (const Parallel& parallel :
             {Parallel(run_serially), Parallel(testing::run_in_threads)}) {
          Owned packed(format_of(text), 6, 70);
          const Status status = packed.quantize(
              best(), method, MatrixView{w.data(), FloatType::kFloat32, 6, 70, 70, 1}, parallel);
          EXPECT_EQ(status.code, StatusCode::kNonFinite) << text;
          EXPECT_NE(status.message.find("weight[2, 69]"), std::string::npos) << status.message;
          EXPECT_NE(status.message.find(std::isnan(bad) ? "NaN" : "infinite"), std::string::npos)
              << status.message;
        }
      }
    }
  }
}

TEST(Quantize, EmptyWeightsAreRefused) {
  Owned packed(format_of("nf4"), 1, 1);
  float w = 0.0f;
  EXPECT_FALSE(
      packed.quantize(best(), Method::kRound, MatrixView{&w, FloatType::kFloat32, 0, 4, 4, 1})
          .ok());
  EXPECT_FALSE(
      packed.quantize(best(), Method::kRound, MatrixView{&w, FloatType::kFloat32, 4, 0, 0, 1})
          .ok());
}

TEST(Quantize, TinyAndHugeWeightsKeepTheirRelativeError) {
  for (const std::string& text : testing::some_formats()) {
    for (Method method : kMethods) {
      const Format format = format_of(text);
      const std::vector<float> one = random_weights(4 * 100, 16, testing::Shape::kUniform);
      Owned base(format, 4, 100);
      ASSERT_TRUE(base.quantize(best(), method, one).ok());
      const double expected = std::sqrt(testing::squared_error(one, base.decoded()));
      for (float scale :
           {1e-30f, 1e-20f, 1e-7f, 1e7f, 1e38f, 2e38f}) {  // max - min overflows in the last
        std::vector<float> w = one;
        for (float& v : w) v *= scale;
        Owned packed(format, 4, 100);
        ASSERT_TRUE(packed.quantize(best(), method, w).ok()) << text << " " << scale;
        std::vector<float> back = packed.decoded();
        double error = 0.0;
        for (size_t i = 0; i < w.size(); ++i)
          error += std::pow((double{back[i]} - double{w[i]}) / scale, 2);
        // Squares underflow below about 1e-19 and overflow above 1e19: the search then keeps the
        // unsearched scale.
        const double slack =
            method == Method::kRound || (scale > 1e-8f && scale < 1e8f) ? 1.02 : 2.5;
        EXPECT_LE(std::sqrt(error), expected * slack)
            << text << " " << scale << " method " << int(method);
      }
      // Below the normal range a float has few bits left itself; nothing may blow up.
      std::vector<float> denormal = one;
      for (float& v : denormal) v *= 1e-38f;
      Owned packed(format, 4, 100);
      ASSERT_TRUE(packed.quantize(best(), method, denormal).ok());
      for (float v : packed.decoded()) EXPECT_LE(std::fabs(v), 2e-38f) << text;
    }
  }
}

TEST(Quantize, AllZerosStayZero) {
  for (const std::string& text : testing::every_format()) {
    const Format format = format_of(text);
    for (Method method : kMethods) {
      Owned packed(format, 3, 70);
      ASSERT_TRUE(packed.quantize(best(), method, std::vector<float>(3 * 70)).ok());
      for (float v : packed.decoded()) ASSERT_EQ(v, 0.0f) << text;
    }
  }
  Owned nf4(format_of("nf4-nodq"), 2, 64);
  ASSERT_TRUE(nf4.quantize(best(), Method::kRound, std::vector<float>(128)).ok());
  for (int i = 0; i < 64; ++i) EXPECT_EQ(nf4.buffer(BufferRole::kCodes)[i], 0x77);
}

TEST(Quantize, AZeroRowBesideOthersIsZeroWhereTheGridHasAZero) {
  std::vector<float> w = random_weights(3 * 70, 17);
  std::fill(w.begin() + 70, w.begin() + 140, 0.0f);
  for (const std::string& text : testing::every_format()) {
    const Format format = format_of(text);
    // Mid-rise has no zero level, a shared scale or an 8-bit coded one is not zero, and a shared
    // real zero point need not be a code.
    if (format.zero == Zero::kMidrise &&
        (format.double_quant || format.grouping == Grouping::kTensor))
      continue;
    if (format.zero == Zero::kFloat && format.grouping == Grouping::kTensor) continue;
    if (format.family() == Family::kLearnedCodebook && format.grouping == Grouping::kTensor)
      continue;
    Owned packed(format, 3, 70);
    ASSERT_TRUE(packed.quantize(best(), Method::kSearch, w).ok());
    const std::vector<float> back = packed.decoded();
    for (int i = 70; i < 140; ++i) ASSERT_EQ(back[static_cast<size_t>(i)], 0.0f) << text;
  }
}

TEST(Quantize, ConstantRows) {
  for (const std::string& text : testing::every_format()) {
    const Format format = format_of(text);
    for (float value : {0.3f, -0.3f, 1e-6f, -500.0f}) {
      const std::vector<float> w(2 * 37, value);
      for (Method method : kMethods) {
        Owned packed(format, 2, 37);
        ASSERT_TRUE(packed.quantize(best(), method, w).ok());
        for (float v : packed.decoded())
          EXPECT_NEAR(v, value, std::fabs(value) * 1.5e-3) << text << " method " << int(method);
      }
    }
  }
}

// The last group of each row holds one weight: its step is tiny, its zero point far from the codes,
// and the 8-bit code of its scale keeps little of it.
TEST(Quantize, FarZeroPointsSurviveDoubleQuantization) {
  const std::vector<float> w = random_weights(64 * 65, 20);
  for (const char* text :
       {"int4-g64-fz-dq", "int4-g16-fz-dq", "int3-g64-fz-dq", "int2-g16-fz-dq"}) {
    for (Method method : kMethods) {
      Owned packed(format_of(text), 64, 65);
      ASSERT_TRUE(packed.quantize(best(), method, w).ok());
      const std::vector<float> back = packed.decoded();
      double error = 0.0;
      for (size_t at = 64; at < w.size(); at += 65) error += std::pow(back[at] - w[at], 2);
      EXPECT_LT(std::sqrt(error / 64), 0.03) << text << " method " << int(method);
    }
  }
}

// Scales of rows a thousand times smaller than the rest come back from 8 bits as little more than
// zero, or less than zero: still a grid that fits those rows better than none.
TEST(Quantize, SmallRowsBesideLargeOnesSurviveDoubleQuantization) {
  std::vector<float> w = random_weights(256 * 64, 21);
  for (size_t i = 0; i < w.size(); ++i) w[i] *= i / 64 % 7 == 0 ? 1e-3f : 0.2f + 0.004f * (i / 64);
  for (const char* text : {"int8-g64-dq", "int4-g64-dq", "int4-g64-sym-dq", "int4-g64-fz-dq",
                           "int3-g64-dq", "nf4", "nf3", "log4", "fp4"}) {
    Owned packed(format_of(text), 256, 64);
    ASSERT_TRUE(packed.quantize(best(), Method::kSearch, w).ok());
    const std::vector<float> back = packed.decoded();
    double error = 0.0, energy = 0.0;
    for (size_t i = 0; i < w.size(); ++i) {
      if (i / 64 % 7 != 0) continue;
      error += std::pow(back[i] - w[i], 2);
      energy += std::pow(w[i], 2);
    }
    EXPECT_LT(error, energy) << text << ": worse than zeros";
  }
}

TEST(Quantize, FewDistinctWeightsAreExactWithLearnedLevels) {
  const float values[] = {-1.5f, -0.25f, 0.0f, 0.75f};
  std::vector<float> w;
  for (int i = 0; i < 3 * 50; ++i) w.push_back(values[i * 7 % 4]);
  for (const char* text : {"kmeans2-row", "kmeans2-tensor", "kmeans3-row", "kmeans4-tensor"}) {
    Owned packed(format_of(text), 3, 50);
    ASSERT_TRUE(packed.quantize(best(), Method::kSearch, w).ok());
    EXPECT_EQ(packed.decoded(), w) << text;
  }
}

TEST(Quantize, PaddingBitsAreZero) {
  for (const std::string& text : testing::every_format()) {
    const Format format = format_of(text);
    if (format.bits() == 8) continue;
    Owned packed(format, 2, 33);
    ASSERT_TRUE(packed.quantize(best(), Method::kRound, random_weights(66, 18)).ok());
    const int64_t bytes = packed_row_bytes(33, format.bits());
    for (int r = 0; r < 2; ++r) {
      std::vector<uint8_t> codes(33), again(static_cast<size_t>(bytes));
      const uint8_t* row = packed.buffer(BufferRole::kCodes) + r * bytes;
      unpack_row(row, 33, format.bits(), codes.data());
      pack_row(codes.data(), 33, format.bits(), again.data());
      EXPECT_EQ(memcmp(row, again.data(), again.size()), 0) << text;
    }
  }
}

TEST(Quantize, ThreadsDoNotChangeABit) {
  const int64_t rows = 29, cols = 197;
  const std::vector<float> w = random_weights(rows * cols, 19, testing::Shape::kOutliers);
  for (const std::string& text : testing::every_format()) {
    const Format format = format_of(text);
    for (Method method : kMethods) {
      Owned alone(format, rows, cols), together(format, rows, cols);
      const MatrixView view{w.data(), FloatType::kFloat32, rows, cols, cols, 1};
      ASSERT_TRUE(alone.quantize(best(), method, view).ok());
      ASSERT_TRUE(together.quantize(best(), method, view, testing::run_in_threads).ok());
      EXPECT_EQ(together.bytes(), alone.bytes()) << text;
    }
  }
}

// Whatever makes it faster, quantizing gives the bytes that it always gave (FNV-1a over all
// buffers of all formats without outliers).
TEST(Quantize, BytesAreWhatTheyWere) {
  uint32_t state = 1;
  const auto uniform = [&] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
  };
  for (const auto& [method, expected] : std::vector<std::pair<Method, uint64_t>>{
           {Method::kRound, 14016641356253599350u}, {Method::kSearch, 13221701918228255917u}}) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const std::string& text : testing::every_format()) {
      if (format_of(text).outliers > 0) continue;
      for (const auto& [rows, cols] :
           std::vector<std::pair<int64_t, int64_t>>{{19, 70}, {2, 1100}}) {
        std::vector<float> w(static_cast<size_t>(rows * cols));
        for (float& v : w) v = uniform() + uniform() + uniform();
        Owned packed(format_of(text), rows, cols);
        ASSERT_TRUE(packed.quantize(best(), method, w).ok());
        for (const std::vector<uint8_t>& buffer : packed.bytes()) {
          for (uint8_t byte : buffer) hash = (hash ^ byte) * 0x100000001b3u;
        }
      }
    }
    EXPECT_EQ(hash, expected) << "method " << int(method);
  }
}

}  // namespace
}  // namespace bitfold
