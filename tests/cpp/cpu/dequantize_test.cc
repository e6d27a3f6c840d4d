#include "cpu/dequantize.h"

#include "support.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::Owned;

TEST(Dequantize, EveryDtypeRoundsOnceWithAnyThreads) {
  const KernelTable& k = active_kernels();
  const int64_t rows = 7, cols = 197;
  for (const std::string& text : testing::some_formats()) {
    Owned w(format_of(text), rows, cols);
    w.fill_randomly(6);
    const std::vector<float> expected = w.decoded();
    std::vector<float> out(expected.size());
    dequantize(k, w.view(), FloatType::kFloat32, out.data(), testing::run_in_threads);
    EXPECT_EQ(memcmp(out.data(), expected.data(), out.size() * 4), 0) << text;
    for (FloatType dtype : {FloatType::kFloat16, FloatType::kBFloat16}) {
      std::vector<uint16_t> bits(expected.size());
      dequantize(k, w.view(), dtype, bits.data(), testing::run_in_threads);
      EXPECT_EQ(bits, testing::to_bits16(expected, dtype)) << text;
    }
  }
}

TEST(Embedding, CopiesRowsInTheOrderAsked) {
  const KernelTable& k = active_kernels();
  const int64_t rows = 11, cols = 65;
  const std::vector<int64_t> indices = {10, 0, 3, 3, 10, 7};
  for (const std::string& text : testing::some_formats()) {
    Owned w(format_of(text), rows, cols);
    w.fill_randomly(7);
    const std::vector<float> table = w.decoded();
    std::vector<float> out(indices.size() * static_cast<size_t>(cols));
    embedding(k, w.view(), indices.data(), static_cast<int64_t>(indices.size()),
              FloatType::kFloat32, out.data(), testing::run_in_threads);
    for (size_t i = 0; i < indices.size(); ++i) {
      EXPECT_EQ(memcmp(out.data() + i * 65, table.data() + indices[i] * cols, 65 * 4), 0) << text;
    }
    embedding(k, w.view(), indices.data(), 0, FloatType::kFloat32, nullptr, run_serially);
  }
}

}  // namespace
}  // namespace bitfold
