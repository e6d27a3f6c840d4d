// Activations at the ends: what integers cannot stand for goes through floats, and sums that come
// as close to 2^31 as they can stay below it.
#include <random>

#include "core/bitpack.h"
#include "products.h"

namespace bitfold {
namespace {

using testing::active_kernels;
using testing::format_of;
using testing::kLevels;
using testing::Owned;
using testing::random_weights;
using testing::Values;

// A row that is not finite: as fp32 arithmetic leaves it. The others: as if it were not there.
TEST(ExtremeValues, NonFiniteActivationsStayInTheirRow) {
  const int64_t n = 17, cols = 150;
  for (const std::string& text : testing::some_formats()) {
    Owned w(format_of(text), n, cols);
    w.fill_randomly(1);
    const std::vector<float> weight = w.decoded();
    for (int64_t m : {1, 2, 5}) {
      for (FloatType dtype : testing::kDtypes) {
        for (float value : {NAN, INFINITY, -INFINITY}) {
          for (int64_t at : {int64_t{0}, cols - 1}) {
            const int64_t bad = m / 2;
            std::vector<float> x = random_weights(m * cols, 2);
            x[static_cast<size_t>(bad * cols + at)] = value;
            const Values xs(dtype, x);
            std::vector<double> exact(static_cast<size_t>(m * n));
            reference::linear(w.view(), xs.floats.data(), m, nullptr, exact.data());
            for (Accuracy level : kLevels) {
              const std::vector<float> y =
                  multiply(active_kernels(), w.view(), xs, m, nullptr, level);
              for (int64_t i = 0; i < m; ++i) {
                if (i == bad) continue;
                const auto first = static_cast<size_t>(i);
                const Values row(
                    dtype, {xs.floats.begin() + i * cols, xs.floats.begin() + (i + 1) * cols});
                expect_product(w.view(), weight, row, 1, nullptr,
                               {y.begin() + i * n, y.begin() + (i + 1) * n}, level,
                               text + " beside row " + std::to_string(first), /*fallback=*/true);
              }
              for (int64_t r = 0; r < n; ++r) {
                const float got = y[static_cast<size_t>(bad * n + r)];
                const double want = exact[static_cast<size_t>(bad * n + r)];
                EXPECT_TRUE(std::isnan(want) ? std::isnan(got) : got == want)
                    << text << " " << testing::name_of(level) << ": " << got << ", not " << want;
              }
            }
          }
        }
      }
    }
  }
}

// Rows whose units do not fill whole vectors read the scales of the next: these may be anything.
TEST(ExtremeValues, NonFiniteScalesStayInTheirRow) {
  const int64_t n = 40, bad = 11;
  for (const char* text : {"nf4-nodq", "nf4-g32-nodq", "nf2-g16-nodq", "int4-g64", "int8-g16-fz",
                           "int2-g128", "int3-row"}) {
    for (int64_t cols : {48, 150, 1200}) {
      Owned w(format_of(text), n, cols);
      w.fill_randomly(1);
      const PackedView view = w.view();
      const bool wide = view.scale_kind == ScaleKind::kFp32;
      uint8_t* scales = w.buffer(BufferRole::kScale);
      for (int64_t group = 0; group < view.groups; group += 4) {  // one of a span
        const int64_t at = bad * view.groups + group;
        if (wide) {
          reinterpret_cast<float*>(scales)[at] = NAN;
        } else {
          reinterpret_cast<uint16_t*>(scales)[at] = 0x7c00;  // infinity
        }
        if (view.zero_kind == Zero::kFloat)
          reinterpret_cast<uint16_t*>(w.buffer(BufferRole::kZero))[at] = 0x7e00;  // NaN
      }
      for (int64_t m : {1, 3, 5, 14, 65}) {
        // The last so that its integers are summed across groups.
        const Values x(m < 64 ? FloatType::kFloat32 : FloatType::kBFloat16,
                       random_weights(m * cols, 2));
        for (Accuracy level : testing::kIntegerLevels) {
          const std::vector<float> y = multiply(active_kernels(), view, x, m, nullptr, level);
          for (int64_t i = 0; i < m * n; ++i) {
            EXPECT_EQ(std::isfinite(y[static_cast<size_t>(i)]), i % n != bad)
                << text << " " << m << " row " << i % n;
          }
        }
      }
    }
  }
}

// Integers cannot stand for levels that are not finite, even if all others are zero.
TEST(ExtremeValues, NonFiniteLevels) {
  const int64_t n = 3, cols = 70;
  Owned w(format_of("kmeans2-row"), n, cols);  // codes of zeros
  for (int64_t i = 0; i < 4 * n; ++i)
    reinterpret_cast<uint16_t*>(w.buffer(BufferRole::kCodebook))[i] = i % 4 ? 0 : 0x7e00;  // NaN
  for (int64_t m : {1, 3, 5}) {
    const Values x(FloatType::kFloat32, random_weights(m * cols, 2));
    for (Accuracy level : kLevels)
      for (float y : multiply(active_kernels(), w.view(), x, m, nullptr, level))
        EXPECT_TRUE(std::isnan(y)) << testing::name_of(level);
  }
}

// Rows of one size each, alone and in one batch, from nothing to 1e30.
TEST(ExtremeValues, TinyAndHugeActivations) {
  const int64_t n = 17, cols = 150;
  for (const std::string& text : testing::some_formats()) {
    Owned w(format_of(text), n, cols);
    w.fill_randomly(2);
    const std::vector<float> weight = w.decoded();
    std::vector<float> all;
    for (float size : {0.0f, 1.0f, 1e-30f, 2e-25f, 1e-20f, 1e20f, 1e28f, 1e30f, 1e35f}) {
      std::vector<float> x = random_weights(cols, 3);
      for (float& v : x) v *= size;
      all.insert(all.end(), x.begin(), x.end());
    }
    std::vector<float> outlier = random_weights(cols, 4, testing::Shape::kGaussian, 1e-6f);
    outlier[77] = 1e6f;
    all.insert(all.end(), outlier.begin(), outlier.end());
    const auto m = static_cast<int64_t>(all.size()) / cols;
    for (FloatType dtype : {FloatType::kFloat32, FloatType::kBFloat16}) {
      const Values bias(dtype, random_weights(n, 5));
      for (Accuracy level : kLevels) {
        for (int64_t i = 0; i < m; ++i) {
          const Values row(dtype, {all.begin() + i * cols, all.begin() + (i + 1) * cols});
          const auto y = multiply(active_kernels(), w.view(), row, 1, nullptr, level);
          expect_product(w.view(), weight, row, 1, nullptr, y, level,
                         text + " row " + std::to_string(i), /*fallback=*/true);
          const Values twice(dtype, [&] {
            std::vector<float> two = row.floats;
            two.insert(two.end(), row.floats.begin(), row.floats.end());
            return two;
          }());
          const auto y2 = multiply(active_kernels(), w.view(), twice, 2, &bias, level);
          expect_product(w.view(), weight, twice, 2, &bias, y2, level,
                         text + " rows " + std::to_string(i), /*fallback=*/true);
        }
        const Values rows(dtype, all);
        const auto y = multiply(active_kernels(), w.view(), rows, m, nullptr, level);
        expect_product(w.view(), weight, rows, m, nullptr, y, level, text + " at once",
                       /*fallback=*/true);
      }
    }
  }
}

// Many rows, whose integers would be summed across groups, with scales near the ends of floats.
TEST(ExtremeValues, TinyAndHugeScales) {
  const int64_t n = 17, cols = 300, m = 64;
  for (const char* text : {"nf4-nodq", "int4-g64", "int8-g64", "int4-row", "int2-g32-zp"}) {
    for (int exponent : {-80, 60, 100}) {  // not so low that weights are denormal: tiles lose those
      Owned w(format_of(text), n, cols);
      w.fill_randomly(4);
      const PackedView view = w.view();
      if (uint8_t* of_scales = w.buffer(BufferRole::kExponent)) {
        *of_scales = static_cast<uint8_t>(exponent);
      } else {
        auto* scales = reinterpret_cast<float*>(w.buffer(BufferRole::kScale));
        for (int64_t i = 0; i < n * view.groups; ++i) scales[i] = std::ldexp(1.0f, exponent);
      }
      std::vector<float> x = random_weights(m * cols, 5);
      for (float& v : x) v = std::ldexp(v, std::clamp(-exponent, -70, 80));
      const Values xs(FloatType::kBFloat16, x);
      const auto y = multiply(active_kernels(), w.view(), xs, m, nullptr, Accuracy::kAuto);
      expect_product(w.view(), w.decoded(), xs, m, nullptr, y, Accuracy::kAuto,
                     std::string(text) + " 2^" + std::to_string(exponent), /*fallback=*/true);
    }
  }
}

// Halves end at 65504, and denormal ones are far above what integers cannot stand for.
TEST(ExtremeValues, EndsOfFloat16) {
  const int64_t n = 5, cols = 130;
  for (const char* text : {"nf4", "int4-g64", "int8-row", "kmeans3-row"}) {
    Owned w(format_of(text), n, cols);
    w.fill_randomly(3);
    // Small weights, so that the product does not overflow.
    uint8_t* exponent = w.buffer(BufferRole::kExponent);
    if (exponent) *exponent = static_cast<uint8_t>(-20);
    std::vector<float> x = random_weights(2 * cols, 6, testing::Shape::kUniform, 65000.0f);
    for (int64_t c = cols; c < 2 * cols; ++c)
      x[static_cast<size_t>(c)] *= 1e-12f;  // denormal or zero
    if (!exponent) {
      for (int64_t c = 0; c < cols; ++c) x[static_cast<size_t>(c)] *= 1e-2f;
    }
    const Values xs(FloatType::kFloat16, x);
    for (Accuracy level : kLevels) {
      const auto y = multiply(active_kernels(), w.view(), xs, 2, nullptr, level);
      expect_product(w.view(), w.decoded(), xs, 2, nullptr, y, level, text);
    }
  }
}

// Codes of the largest and the least level, by turns of `period`; 0: all of one kind, by rows.
void fill_with_extremes(Owned* w, int64_t period) {
  const PackedView view = w->view();
  std::vector<uint8_t> codes(static_cast<size_t>(view.cols));
  for (int64_t r = 0; r < view.rows; ++r) {
    unsigned least = 0, most = (1u << view.bits) - 1;
    if (view.family != Family::kInteger) {
      for (unsigned code = 0; code < 1u << view.bits; ++code) {
        if (level_of(view, r, code) < level_of(view, r, least)) least = code;
        if (level_of(view, r, code) > level_of(view, r, most)) most = code;
      }
    }
    for (int64_t c = 0; c < view.cols; ++c) {
      const bool high = period ? c / period % 2 == 0 : r % 2 == 0;
      codes[static_cast<size_t>(c)] = static_cast<uint8_t>(high ? most : least);
    }
    pack_row(codes.data(), view.cols, view.bits,
             w->buffer(BufferRole::kCodes) + r * view.row_bytes);
  }
}

// One size throughout, the sign by turns; one value alone in 64; all just below one.
std::vector<std::vector<float>> extreme_rows(int64_t cols) {
  std::vector<std::vector<float>> rows;
  const auto add = [&](const auto& value) {
    std::vector<float> row(static_cast<size_t>(cols));
    for (int64_t c = 0; c < cols; ++c) row[static_cast<size_t>(c)] = value(c);
    rows.push_back(row);
  };
  std::mt19937 rng(1);
  std::uniform_real_distribution<float> near_one(0.97f, 1.0f);
  add([](int64_t) { return 1.0f; });
  add([](int64_t) { return -1.0f; });
  for (int64_t period : {1, 2, 4, 8, 16, 32})
    add([&](int64_t c) { return c / period % 2 ? -1.0f : 1.0f; });
  add([](int64_t c) { return c % 64 == 37 ? 1.0f : 0.0f; });
  add([&](int64_t) { return near_one(rng); });
  return rows;
}

std::vector<float> joined(const std::vector<std::vector<float>>& rows) {
  std::vector<float> all;
  for (const auto& row : rows) all.insert(all.end(), row.begin(), row.end());
  return all;
}

constexpr const char* kExtremeFormats[] = {
    "nf4",          "nf3",      "nf2",         "fp4",
    "log4",         "nf4-g16",  "kmeans4-row", "kmeans3-tensor",
    "kmeans2-row",  "int8-row", "int8-g64-zp", "int4-g64",
    "int4-g16-sym", "int3-g64", "int2-g64",    "int2-g64-zp",
    "int4-row",     "int2-row"};

TEST(ExtremeValues, SumsOfAUnitStayBelowTwoToThe31) {
  const int64_t n = 17, cols = 192;
  std::vector<std::vector<float>> rows = extreme_rows(cols);
  const auto add = [&](const auto& value) {
    std::vector<float> row(static_cast<size_t>(cols));
    for (int64_t c = 0; c < cols; ++c) row[static_cast<size_t>(c)] = value(c);
    rows.push_back(row);
  };
  // Where sums are limited, steps are 1 here, and all 64 of a unit round up: 273424 in all.
  add([](int64_t c) { return (c % 64 < 16 ? 4272.0f : 4271.0f) + 0.515625f; });
  add([](int64_t c) { return (c % 64 < 16 ? -4272.0f : -4271.0f) - 0.515625f; });
  const std::vector<float> all = joined(rows);
  const auto m = static_cast<int64_t>(rows.size());

  for (const char* text : kExtremeFormats) {
    Owned w(format_of(text), n, cols);
    w.fill_randomly(7);
    for (int64_t period : {0, 1, 2, 4, 8, 16, 32}) {
      fill_with_extremes(&w, period);
      const std::vector<float> weight = w.decoded();
      for (Accuracy level : kLevels) {
        const Values xs(FloatType::kFloat32, all);
        const std::string what = std::string(text) + " period " + std::to_string(period);
        const auto y = multiply(active_kernels(), w.view(), xs, m, nullptr, level);
        expect_product(w.view(), weight, xs, m, nullptr, y, level, what);
        for (const auto& row : rows) {
          const Values one(FloatType::kFloat32, row);
          const auto y1 = multiply(active_kernels(), w.view(), one, 1, nullptr, level);
          expect_product(w.view(), weight, one, 1, nullptr, y1, level, what);
        }
      }
    }
  }
}

TEST(ExtremeValues, SumsAcrossGroupsStayBelowTwoToThe31) {
  const int64_t n = 17, cols = 576;
  std::vector<std::vector<float>> rows = extreme_rows(cols);
  const size_t kinds = rows.size();
  while (rows.size() < 64) rows.push_back(rows[rows.size() % kinds]);
  const Values xs(FloatType::kBFloat16, joined(rows));
  for (const char* text : kExtremeFormats) {
    Owned w(format_of(text), n, cols);
    w.fill_randomly(7);
    for (int64_t period : {0, 1, 8, 32, 64, 256}) {
      fill_with_extremes(&w, period);
      const auto y = multiply(active_kernels(), w.view(), xs, 64, nullptr, Accuracy::kAuto);
      expect_product(w.view(), w.decoded(), xs, 64, nullptr, y, Accuracy::kAuto,
                     std::string(text) + " period " + std::to_string(period));
    }
  }
}

}  // namespace
}  // namespace bitfold
