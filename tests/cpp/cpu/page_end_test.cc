// Nothing is read or written past a buffer: each one ends where a page ends, and the next page may
// not be touched.
#include <gtest/gtest.h>

#ifdef __linux__

#include <sys/mman.h>
#include <unistd.h>

#include "cpu/dequantize.h"
#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::Owned;
using testing::Values;

// Bytes that end at the end of their last page.
class AtPageEnd {
 public:
  AtPageEnd(const void* bytes, size_t size) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t pages = (size + page - 1) / page * page;
    mapped_ = pages + page;
    start_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED) std::abort();
    uint8_t* end = static_cast<uint8_t*>(start_) + pages;
    if (mprotect(end, page, PROT_NONE) != 0) std::abort();
    data_ = end - size;
    if (bytes) memcpy(data_, bytes, size);
  }
  AtPageEnd(AtPageEnd&& other) noexcept
      : start_(std::exchange(other.start_, nullptr)), mapped_(other.mapped_), data_(other.data_) {}
  ~AtPageEnd() {
    if (start_) munmap(start_, mapped_);
  }
  uint8_t* data() const { return data_; }

 private:
  void* start_;
  size_t mapped_;
  uint8_t* data_;
};

class WeightAtPageEnd {
 public:
  WeightAtPageEnd(const Owned& w, int64_t rows, int64_t cols)
      : format_(w.format()), rows_(rows), cols_(cols) {
    for (const std::vector<uint8_t>& bytes : w.bytes()) {
      buffers_.emplace_back(bytes.data(), bytes.size());
      pointers_.push_back(buffers_.back().data());
    }
  }
  PackedView view() const { return make_view(format_, rows_, cols_, pointers_.data()); }

 private:
  Format format_;
  int64_t rows_, cols_;
  std::vector<AtPageEnd> buffers_;
  std::vector<const void*> pointers_;
};

// Products and decoding, where codes lie in panels.
void check_panels(const std::string& text, int64_t n, int64_t cols) {
  const KernelTable& k = active_kernels();
  const Format format = testing::format_of(text);
  if (!suits_panels(format, n, cols)) return;
  Owned owned(format, n, cols);
  owned.fill_randomly(static_cast<unsigned>(cols));
  const WeightAtPageEnd rows(owned, n, cols);
  const testing::InPanels in_panels(owned.view());
  PackedView w = rows.view();
  const AtPageEnd codes(in_panels.view().codes, static_cast<size_t>(n * w.row_bytes));
  w.codes = codes.data();
  w.layout = Layout::kPanels;
  std::vector<float> decoded(static_cast<size_t>(n * cols));
  dequantize(k, w, FloatType::kFloat32, decoded.data(), run_serially);
  EXPECT_EQ(decoded, owned.decoded()) << text;
  for (int64_t m : {1, 5, 13}) {
    const Values x(FloatType::kFloat32, testing::random_weights(m * cols, 1));
    for (Accuracy level : testing::kLevels) {
      EXPECT_EQ(multiply(k, w, x, m, nullptr, level),
                multiply(k, in_panels.view(), x, m, nullptr, level))
          << text << " " << testing::name_of(level) << " " << m << "x" << n << "x" << cols;
    }
  }
}

void check(const std::string& text, int64_t n, int64_t cols, FloatType dtype,
           const std::vector<int64_t>& batches = {1, 5}) {
  const KernelTable& k = active_kernels();
  const Format format = testing::format_of(text);
  Owned owned(format, n, cols);
  owned.fill_randomly(static_cast<unsigned>(cols));
  const WeightAtPageEnd w(owned, n, cols);
  const size_t size = static_cast<size_t>(size_of(dtype));
  const auto count = [](int64_t i) { return static_cast<size_t>(i); };
  for (int64_t m : batches) {
    const Values x(dtype, testing::random_weights(m * cols, 1));
    const Values bias(dtype, testing::random_weights(n, 2));
    const AtPageEnd x_end(x.data(), count(m * cols) * size), bias_end(bias.data(), count(n) * size);
    const AtPageEnd y_end(nullptr, count(m * n) * size), gx_end(nullptr, count(m * cols) * size);
    for (Accuracy level : testing::kLevels) {
      const auto expected = multiply(k, owned.view(), x, m, &bias, level);
      linear(k, w.view(), x_end.data(), m, bias_end.data(), dtype, y_end.data(), level,
             run_serially);
      const Values stored(dtype, expected);  // exact: they are numbers of that type
      EXPECT_EQ(memcmp(y_end.data(), stored.data(), count(m * n) * size), 0)
          << text << " " << testing::name_of(level) << " " << m << "x" << n << "x" << cols;
    }
    // y as the gradient of itself
    linear_grad_input(k, w.view(), y_end.data(), m, dtype, gx_end.data(), run_serially);
  }
  const AtPageEnd out(nullptr, count(n * cols) * size);
  dequantize(k, w.view(), dtype, out.data(), run_serially);
}

TEST(PageEnd, EveryFormatAndRaggedRows) {
  for (const std::string& text : testing::every_format()) {
    for (int64_t cols : {1, 15, 17, 31, 33, 63, 65, 100, 127, 129, 200, 255, 257, 513})
      for (int64_t n : {1, 3, 16, 17}) check(text, n, cols, FloatType::kFloat32);
  }
}

TEST(PageEnd, Halves) {
  for (const std::string& text : testing::some_formats()) {
    for (int64_t cols : {1, 17, 129, 257}) {
      check(text, 5, cols, FloatType::kFloat16);
      check(text, 5, cols, FloatType::kBFloat16, {1, 5, 64});
    }
  }
}

TEST(PageEnd, Panels) {
  for (const std::string& text : testing::every_format()) {
    for (int64_t cols : {64, 192, 320})
      for (int64_t n : {16, 48}) check_panels(text, n, cols);
  }
}

TEST(PageEnd, RowsOfManyPages) {
  for (const std::string& text : testing::some_formats())
    check(text, 17, 9001, FloatType::kFloat32);
}

}  // namespace
}  // namespace bitfold

#endif  // __linux__
