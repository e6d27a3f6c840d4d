#include "cpu/dequantize.h"

#include <atomic>

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

TEST(DecodeRow, AroundTheCachesAtAnyAddress) {
  const KernelTable& k = active_kernels();
  for (const std::string& text : testing::dense_formats(testing::some_formats())) {
    for (int64_t cols : {1, 17, 64, 213}) {
      Owned w(format_of(text), 2, cols);
      w.fill_randomly(static_cast<unsigned>(cols));
      const std::vector<float> all = w.decoded();
      const std::vector<float> expected(all.begin() + cols, all.end());
      for (FloatType dtype : {FloatType::kFloat32, FloatType::kFloat16, FloatType::kBFloat16}) {
        const size_t size = dtype == FloatType::kFloat32 ? 4 : 2;
        const size_t bytes = static_cast<size_t>(cols) * size;
        const std::vector<uint16_t> bits = testing::to_bits16(expected, dtype);
        for (size_t skew : {size_t{0}, size}) {
          for (bool stream : {false, true}) {
            alignas(64) uint8_t out[4 * 213 + 8];
            memset(out, 0xee, sizeof out);
            k.decode_row(w.view(), 1, dtype, out + skew, stream);
            std::atomic_thread_fence(std::memory_order_seq_cst);
            const void* want = size == 4 ? static_cast<const void*>(expected.data()) : bits.data();
            EXPECT_EQ(memcmp(out + skew, want, bytes), 0)
                << text << " " << cols << " stream " << stream << " skew " << skew;
            EXPECT_EQ(out[skew + bytes], 0xee) << "wrote past the end";
          }
        }
      }
    }
  }
}

TEST(Dequantize, LargeResultsAreStreamed) {
  const int64_t rows = 1025, cols = 4096;  // 16 MiB and a row
  Owned w(format_of("nf4"), rows, cols);
  w.fill_randomly(8);
  const std::vector<float> expected = w.decoded();
  std::vector<float> out(expected.size());
  dequantize(active_kernels(), w.view(), FloatType::kFloat32, out.data(), testing::run_in_threads);
  EXPECT_EQ(memcmp(out.data(), expected.data(), out.size() * 4), 0);
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
