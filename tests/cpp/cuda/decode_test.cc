// What CUDA kernels decode with, run here place by place against the scalar reference.
#include "cuda/decode.h"

#include "core/codebook.h"
#include "support.h"

namespace bitfold::cuda {
namespace {

using bitfold::testing::format_of;
using bitfold::testing::Owned;

// The host can read the buffers, so that addresses of values are as good as on the device.
DeviceWeight device_weight(const Owned& w, int64_t rows, int64_t cols) {
  std::vector<const void*> buffers;
  for (size_t i = 0; i < w.format().buffers(rows, cols).size(); ++i)
    buffers.push_back(w.pointer(i));
  return make_device_weight(w.format(), rows, cols, buffers.data());
}

// As the kernel does it: unit after unit, tables of levels filled beforehand.
template <int kBits, int N>
std::vector<float> decode_by_units(const DeviceWeight& w) {
  const PackedView& view = w.view;
  const Values values = read_values(w.addresses);
  std::vector<float> out(static_cast<size_t>(view.rows * view.cols));
  for (int64_t row = 0; row < view.rows; ++row) {
    float table[16];
    for (unsigned code = 0; view.family != Family::kInteger && code < 1u << kBits; ++code) {
      table[code] = view.family == Family::kFixedCodebook ? w.levels[code]
                                                          : learned_level(view, values, row, code);
    }
    for (int64_t col = 0; col < view.cols; col += N) {
      const UnitCodes codes =
          load_unit<kBits, N>(view.codes + row * view.row_bytes, view.plane_bytes, col);
      const UnitParameters p = parameters_at(view, values, kDynamicMap, row, col / view.group_size);
      float* to = out.data() + row * view.cols + col;
      if (view.family == Family::kInteger) {
        decode_unit<kBits, N, false>(codes, p, nullptr, to);
      } else if constexpr (kBits <= 4) {
        decode_unit<kBits, N, true>(codes, p, table, to);
      }
    }
  }
  return out;
}

template <int N>
std::vector<float> decode_by_units(const DeviceWeight& w) {
  switch (w.view.bits) {
    case 8:
      return decode_by_units<8, N>(w);
    case 4:
      return decode_by_units<4, N>(w);
    case 3:
      return decode_by_units<3, N>(w);
    default:
      return decode_by_units<2, N>(w);
  }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST(CudaDecode, WeightAfterWeightEveryFormatAndShape) {
  for (const std::string& text : bitfold::testing::every_format()) {
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {5, 130}}) {
      Owned w(format_of(text), rows, cols, /*skew=*/1);
      w.fill_randomly(static_cast<unsigned>(cols));
      const DeviceWeight device = device_weight(w, rows, cols);
      const PackedView& view = device.view;
      const Values values = read_values(device.addresses);
      std::vector<float> out(static_cast<size_t>(rows * cols));
      for (int64_t r = 0; r < rows; ++r) {
        float* row = out.data() + r * cols;
        for (int64_t c = 0; c < cols; ++c) row[c] = weight_at(device, values, kDynamicMap, r, c);
        const OutlierRange range = outlier_range(view.outliers, r);
        for (int64_t i = range.begin; i < range.end; ++i) {
          const int64_t c = column_of_outlier(view, i);
          if (c < 0) continue;
          row[c] = weight_at(device, values, kDynamicMap, r, c) +
                   from_half(view.outliers.value[i]) * values.outlier_factor;
        }
      }
      EXPECT_TRUE(same_bits(out, w.decoded())) << text << " [" << rows << ", " << cols << "]";
    }
  }
}

TEST(CudaDecode, UnitsOfFourAndEightEveryFormat) {
  for (const std::string& text :
       bitfold::testing::dense_formats(bitfold::testing::every_format())) {
    for (int64_t cols : {8, 24, 136, 512}) {
      Owned w(format_of(text), 5, cols);
      w.fill_randomly(static_cast<unsigned>(cols));
      const DeviceWeight device = device_weight(w, 5, cols);
      EXPECT_TRUE(same_bits(decode_by_units<8>(device), w.decoded())) << text << " " << cols;
      EXPECT_TRUE(same_bits(decode_by_units<4>(device), w.decoded())) << text << " " << cols;
    }
  }
}

TEST(CudaDecode, PowersOfTwoOfEveryByte) {
  for (int exponent = -128; exponent <= 127; ++exponent)
    EXPECT_EQ(power_of_two(exponent), std::ldexp(1.0f, exponent)) << exponent;
}

TEST(CudaDecode, SmallIntegersAreExact) {
  for (unsigned code = 0; code < 256; ++code)
    EXPECT_EQ(small_to_float(code), static_cast<float>(code));
}

TEST(CudaDecode, OutliersThatLieStayInside) {
  Owned w(format_of("int4-g64-outliers30"), 3, 100);
  w.fill_randomly(1);
  auto* row = reinterpret_cast<int32_t*>(w.buffer(BufferRole::kOutlierRow));
  row[0] = -5;
  row[1] = 1 << 30;
  row[2] = 2;
  const DeviceWeight device = device_weight(w, 3, 100);
  for (int64_t r = 0; r < 3; ++r) {
    const OutlierRange range = outlier_range(device.view.outliers, r);
    EXPECT_GE(range.begin, 0);
    EXPECT_LE(range.begin, range.end);
    EXPECT_LE(range.end, device.view.outliers.count);
  }
}

}  // namespace
}  // namespace bitfold::cuda
