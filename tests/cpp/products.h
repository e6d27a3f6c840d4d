// What the tests of products share: activations of each type, one call of linear, and how far each
// level of accuracy may be from the product in double.
#pragma once

#include <algorithm>

#include "cpu/activations.h"
#include "cpu/integer_product.h"
#include "cpu/linear.h"
#include "support.h"

namespace bitfold::testing {

inline constexpr Accuracy kLevels[] = {Accuracy::kAuto, Accuracy::kFp32, Accuracy::kInt8};
inline constexpr Accuracy kIntegerLevels[] = {Accuracy::kAuto, Accuracy::kInt8};
inline constexpr FloatType kDtypes[] = {FloatType::kFloat32, FloatType::kFloat16,
                                        FloatType::kBFloat16};

inline std::string name_of(Accuracy level) {
  return level == Accuracy::kAuto ? "auto" : level == Accuracy::kFp32 ? "fp32" : "int8";
}

// Numbers as `dtype` stores them, and the same as floats.
struct Values {
  FloatType dtype;
  std::vector<float> floats;
  std::vector<uint16_t> bits;

  Values(FloatType type, std::vector<float> values) : dtype(type), floats(std::move(values)) {
    if (dtype == FloatType::kFloat32) return;
    bits = to_bits16(floats, dtype);
    for (size_t i = 0; i < bits.size(); ++i) floats[i] = from_bits16(bits[i], dtype);
  }
  const void* data() const {
    return dtype == FloatType::kFloat32 ? static_cast<const void*>(floats.data()) : bits.data();
  }
};

// What write(y) leaves in y [n] of `dtype`, as floats; it may not write past the end.
template <class Write>
inline std::vector<float> written(FloatType dtype, int64_t n, const Write& write) {
  std::vector<float> y(static_cast<size_t>(n) + 1, 99.0f);
  std::vector<uint16_t> y16(y.size(), 99);
  const bool wide = dtype == FloatType::kFloat32;
  write(wide ? static_cast<void*>(y.data()) : y16.data());
  EXPECT_TRUE(wide ? y.back() == 99.0f : y16.back() == 99) << "wrote past the end";
  for (size_t i = 0; !wide && i < y.size(); ++i) y[i] = from_bits16(y16[i], dtype);
  y.pop_back();
  return y;
}

// y [m, w.rows] as floats.
inline std::vector<float> multiply(const KernelTable& k, const PackedView& w, const Values& x,
                                   int64_t m, const Values* bias, Accuracy level,
                                   const Parallel& parallel = run_serially) {
  return written(x.dtype, m * w.rows, [&](void* y) {
    linear(k, w, x.data(), m, bias ? bias->data() : nullptr, x.dtype, y, level, parallel);
  });
}

// fp32 arithmetic: summands of a lane over K, sixteen lanes, one rounding per tile of 512 columns,
// bias.
inline double float_bound(int64_t k, double magnitude) {
  return (static_cast<double>(k) / 16.0 + static_cast<double>(k) / 512.0 + 22.0) * 1.01 * kRound *
         magnitude;
}

struct Expected {
  double value, allowed;
};

// One output: what it is in double, and the most that a level may lose before the result is stored.
// Integers stand for x in steps of `step` per span, and for levels of a codebook in steps of
// `level_step`: each is at most half a step off. Where a span is several units, weights are
// integers in steps of their own. float32 then sums the spans.
inline Expected expected_product(const PackedView& w, int64_t r, const float* weight,
                                 const float* x, double bias, Accuracy level,
                                 bool across_groups = false) {
  const bool eight = level == Accuracy::kInt8, codebook = w.family != Family::kInteger;
  const auto [unit, span] = [&] {
    const Activations a = describe_activations(w, Operand::kWords, Walk::kPanels, 1, across_groups);
    return std::pair(a.unit, a.span);
  }();
  const double limit = eight ? 127.0 : codebook || across_groups ? 32767.0 : 32639.0;
  const double sum_limit = !eight && (codebook || across_groups) ? sum_limit_of(span) : INFINITY;
  const double level_limit = eight ? 127.0 : kLevelLimit;
  double largest = 0.0;
  for (unsigned code = 0; codebook && code < 1u << w.bits; ++code)
    largest = std::max<double>(largest, std::fabs(level_of(w, r, code)));

  Expected result{bias, 0.0};
  double lost = 0.0, product_size = std::fabs(bias), operand_size = std::fabs(bias);
  for (int64_t begin = 0; begin < w.cols; begin += span) {
    const int64_t end = std::min(begin + span, w.cols);
    double absmax = 0.0, x_sum = 0.0, w_sum = 0.0;
    for (int64_t c = begin; c < end; ++c) {
      const double size = std::fabs(x[c]), product = double{x[c]} * weight[c];
      absmax = std::max(absmax, size);
      x_sum += size;
      w_sum += std::fabs(weight[c]);
      result.value += product;
      product_size += std::fabs(product);
    }
    // The quotient that is rounded carries roundings of its own.
    const double step = std::max(absmax / limit, x_sum / sum_limit) * (1.0 + 1e-5);
    const double half_x = step * (0.5 + 3.0 * limit * kRound);
    double half_w = 0.0, reach = 0.0;  // of the span's groups, the most
    for (int64_t at = begin; at < end; at += unit) {
      const int64_t group = at / w.group_size;
      const double scale = std::fabs(scale_of(w, r, group));
      const double level_step = codebook ? scale * largest / level_limit : 0.0;
      half_w = std::max(half_w, level_step * (0.5 + 3.0 * level_limit * kRound));
      // Codes are counted from 0 or from the middle, levels of 8 bits from -128: what that adds is
      // subtracted with the zero point.
      const double farthest =
          codebook ? largest * (eight ? 3.1 : 1.01)
                   : static_cast<double>(1 << w.bits) + std::fabs(zero_of(w, r, group));
      reach = std::max(reach, scale * farthest);
    }
    // An operand times its share, the zero point, and the share itself: each is rounded.
    if (across_groups) half_w += reach / (kLevelLimit - 4) * 1.2;
    const double n = static_cast<double>(end - begin);
    lost += half_x * w_sum + half_w * x_sum + n * half_x * half_w;
    operand_size += (x_sum + n * half_x) * reach;
  }
  const double units = static_cast<double>((w.cols + unit - 1) / unit);
  // Outliers are multiplied by floats at every level, and summed one after another.
  const auto [first, last] = outliers_of(w.outliers, r);
  for (int64_t i = first; i < last; ++i) {
    const double value = half_to_float(w.outliers.value[i]) * w.outliers.factor;
    const double size = std::fabs(value * x[outlier_column(w, i)]) + product_size;
    lost += (static_cast<double>(last - first) + 2.0 * units + 20.0) * 1.01 * kRound * size;
  }
  result.allowed = level == Accuracy::kFp32
                       ? float_bound(w.cols, product_size)
                       : lost + (2.0 * units + 20.0) * 1.01 * kRound * operand_size;
  return result;
}

// y against the product in double; only the worst output is told. `fallback`: fp32 arithmetic may
// have been chosen instead.
inline void expect_product(const PackedView& w, const std::vector<float>& weight, const Values& x,
                           int64_t m, const Values* bias, const std::vector<float>& y,
                           Accuracy level, const std::string& what, bool fallback = false) {
  const bool may_sum_across = level == Accuracy::kAuto && sums_across_groups(x.dtype, m);
  double worst = 1.0;
  std::string message;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < w.rows; ++r) {
      const float* row = weight.data() + r * w.cols;
      const float* of = x.floats.data() + i * w.cols;
      const double b = bias ? bias->floats[static_cast<size_t>(r)] : 0.0;
      Expected e = expected_product(w, r, row, of, b, level);
      if (may_sum_across) {
        e.allowed = std::max(e.allowed, expected_product(w, r, row, of, b, level, true).allowed);
      }
      if (fallback) e.allowed += expected_product(w, r, row, of, b, Accuracy::kFp32).allowed;
      e.allowed += 1.01 * store_error(x.dtype, std::fabs(e.value) + e.allowed) + 1e-44;
      const double got = y[static_cast<size_t>(i * w.rows + r)];
      const double ratio = std::fabs(got - e.value) / e.allowed;
      if (ratio <= worst) continue;  // false for NaN
      worst = ratio;
      message = "y[" + std::to_string(i) + ", " + std::to_string(r) + "] = " + std::to_string(got) +
                ", not " + std::to_string(e.value) + " +- " + std::to_string(e.allowed);
      if (std::isnan(ratio)) break;
    }
  }
  EXPECT_TRUE(message.empty()) << what << " " << name_of(level) << " " << m << "x" << w.rows << "x"
                               << w.cols << " dtype " << int(x.dtype) << ": " << message;
}

// Random bytes as a weight, random activations, one product.
inline void check_product(const KernelTable& k, const std::string& text, int64_t m, int64_t n,
                          int64_t cols, FloatType dtype, Accuracy level,
                          const Parallel& parallel = run_serially) {
  Owned w(format_of(text), n, cols, /*skew=*/1);
  w.fill_randomly(static_cast<unsigned>(cols + n));
  const Values x(dtype, random_weights(m * cols, 2)), bias(dtype, random_weights(n, 3));
  const std::vector<float> y = multiply(k, w.view(), x, m, &bias, level, parallel);
  expect_product(w.view(), w.decoded(), x, m, &bias, y, level, text);
}

}  // namespace bitfold::testing
