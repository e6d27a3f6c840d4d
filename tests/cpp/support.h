// What the C++ tests share: every format, random matrices, owned buffers behind a PackedView, and
// threads that really run.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "core/float16.h"
#include "core/format.h"
#include "core/parallel.h"
#include "core/reference/reference.h"
#include "core/view.h"
#include "cpu/isa.h"
#include "solvers/quantize.h"

namespace bitfold::testing {

inline Format format_of(const std::string& text) {
  Format format;
  const Status status = Format::parse(text, &format);
  EXPECT_TRUE(status.ok()) << status.message;
  return format;
}

// Every combination of options that the grammar accepts, for a few group sizes; as canonical
// strings, each once.
inline const std::vector<std::string>& every_format() {
  static const std::vector<std::string> all = [] {
    std::set<std::string> seen;
    std::vector<std::string> list;
    for (const ElementCode& element : element_codes()) {
      for (const char* grouping : {"", "-g16", "-g48", "-g64", "-g128", "-row", "-tensor"}) {
        for (const char* zero : {"", "-sym", "-zp", "-fz", "-midrise"}) {
          for (const char* quant : {"", "-dq", "-nodq"}) {
            for (const char* outliers : {"", "-outliers30"}) {
              if (*outliers && *grouping) continue;  // they do not care about groups
              Format format;
              const std::string text = std::string(element.name) + grouping + zero + quant;
              if (!Format::parse(text + outliers, &format).ok()) continue;
              if (seen.insert(format.to_string()).second) list.push_back(format.to_string());
            }
          }
        }
      }
    }
    return list;
  }();
  return all;
}

// Those without outliers, which kernels of the dense part know nothing of.
inline std::vector<std::string> dense_formats(const std::vector<std::string>& all) {
  std::vector<std::string> dense;
  for (const std::string& text : all) {
    if (text.find("-outliers") == std::string::npos) dense.push_back(text);
  }
  return dense;
}

// One of each family, zero point and scale encoding.
inline const std::vector<std::string>& some_formats() {
  static const std::vector<std::string> some = {"nf4",
                                                "nf4-nodq",
                                                "nf3",
                                                "nf2",
                                                "fp4",
                                                "log4",
                                                "int8-row",
                                                "int8-g64",
                                                "int8-tensor",
                                                "int4-g64",
                                                "int4-g64-sym",
                                                "int4-g64-fz",
                                                "int4-g64-dq",
                                                "int4-g16",
                                                "int4-row",
                                                "int4-tensor",
                                                "int3-g64",
                                                "int3-g128-sym",
                                                "int2-g64",
                                                "int2-g64-zp",
                                                "int2-g64-fz",
                                                "nf3-tensor",
                                                "kmeans4-row",
                                                "kmeans3-tensor",
                                                "kmeans2-row",
                                                "nf4-outliers",
                                                "int3-g64-outliers50",
                                                "kmeans4-row-outliers100"};
  return some;
}

enum class Shape { kGaussian, kUniform, kLaplace, kOutliers };

inline std::vector<float> random_weights(int64_t n, unsigned seed, Shape shape = Shape::kGaussian,
                                         float scale = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> w(static_cast<size_t>(n));
  for (float& v : w) {
    switch (shape) {
      case Shape::kGaussian:
        v = normal(rng);
        break;
      case Shape::kUniform:
        v = uniform(rng);
        break;
      case Shape::kLaplace:
        v = std::copysign(std::log(std::max(1e-6f, std::fabs(uniform(rng)))), uniform(rng));
        break;
      case Shape::kOutliers:
        v = normal(rng) * (rng() % 97 == 0 ? 12.0f : 1.0f);
        break;
    }
    v *= scale;
  }
  return w;
}

// A packed weight that owns its buffers. Each buffer has its exact size, so that AddressSanitizer
// sees a byte too far; `skew` bytes come before the codes, so that they start at an odd address.
class Owned {
 public:
  Owned(const Format& format, int64_t rows, int64_t cols, size_t skew = 0)
      : format_(format), rows_(rows), cols_(cols) {
    for (const BufferSpec& spec : format.buffers(rows, cols)) {
      const size_t before = spec.role == BufferRole::kCodes ? skew : 0;
      storage_.emplace_back(new uint8_t[before + static_cast<size_t>(spec.nbytes())]());
      pointers_.push_back(storage_.back().get() + before);
      sizes_.push_back(static_cast<size_t>(spec.nbytes()));
      roles_.push_back(spec.role);
    }
  }

  Status quantize(const KernelTable& k, Method method, const MatrixView& w,
                  const Parallel& parallel = run_serially) {
    return bitfold::quantize(k, format_, method, w, pointers_.data(), parallel);
  }
  Status quantize(const KernelTable& k, Method method, const std::vector<float>& w) {
    return quantize(k, method, MatrixView{w.data(), FloatType::kFloat32, rows_, cols_, cols_, 1});
  }

  // Any bytes at all are a valid weight, but for scales: those stay small and finite; and outliers
  // have places.
  void fill_randomly(unsigned seed) {
    std::mt19937 rng(seed);
    for (size_t i = 0; i < pointers_.size(); ++i) {
      for (size_t at = 0; at < sizes_[i]; ++at) pointer(i)[at] = static_cast<uint8_t>(rng());
    }
    std::uniform_real_distribution<float> scale(0.01f, 2.0f);
    const BufferTable specs = format_.buffers(rows_, cols_);
    for (size_t i = 0; i < specs.size(); ++i) {
      if (specs[i].role == BufferRole::kOutlierColumn || specs[i].role == BufferRole::kOutlierRow)
        continue;
      if (specs[i].dtype == DType::kInt32) {
        for (size_t at = 0; at < sizes_[i] / 4; ++at)
          reinterpret_cast<float*>(pointer(i))[at] = scale(rng);
      } else if (specs[i].dtype == DType::kInt16) {
        const bool either =
            specs[i].role == BufferRole::kCodebook || specs[i].role == BufferRole::kOutlierValue;
        const float sign = either ? -1.0f : 1.0f;
        for (size_t at = 0; at < sizes_[i] / 2; ++at) {
          reinterpret_cast<uint16_t*>(pointer(i))[at] =
              float_to_half((at % 2 ? sign : 1.0f) * scale(rng));
        }
      } else if (specs[i].role == BufferRole::kExponent) {
        *pointer(i) = static_cast<uint8_t>(-3);
      } else if (specs[i].role == BufferRole::kOutlierExponent) {
        *pointer(i) = 1;
      }
    }
    if (format_.outliers > 0) place_outliers_randomly(&rng);
  }

  void place_outliers_randomly(std::mt19937* rng) {
    auto* row = reinterpret_cast<int32_t*>(buffer(BufferRole::kOutlierRow));
    uint8_t* column = buffer(BufferRole::kOutlierColumn);
    const int64_t size = rows_ * cols_;
    int64_t left = format_.outlier_count(rows_, cols_);
    int32_t at = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (i % cols_ == 0) row[i / cols_] = at;
      if (static_cast<int64_t>((*rng)() % static_cast<uint64_t>(size - i)) >= left) continue;
      --left;
      const int32_t col = static_cast<int32_t>(i % cols_);
      if (cols_ <= kMaxShortColumns) {
        reinterpret_cast<uint16_t*>(column)[at] = static_cast<uint16_t>(col);
      } else {
        reinterpret_cast<int32_t*>(column)[at] = col;
      }
      ++at;
    }
    row[rows_] = at;
  }

  PackedView view() const { return make_view(format_, rows_, cols_, pointers_.data()); }
  std::vector<float> decoded() const {
    std::vector<float> out(static_cast<size_t>(rows_ * cols_));
    reference::dequantize(view(), out.data());
    return out;
  }
  std::vector<std::vector<uint8_t>> bytes() const {
    std::vector<std::vector<uint8_t>> all;
    for (size_t i = 0; i < pointers_.size(); ++i) {
      const auto* p = static_cast<const uint8_t*>(pointers_[i]);
      all.emplace_back(p, p + sizes_[i]);
    }
    return all;
  }
  uint8_t* pointer(size_t i) const { return static_cast<uint8_t*>(pointers_[i]); }
  uint8_t* buffer(BufferRole role) const {
    for (size_t i = 0; i < roles_.size(); ++i) {
      if (roles_[i] == role) return pointer(i);
    }
    return nullptr;
  }
  const Format& format() const { return format_; }

 private:
  Format format_;
  int64_t rows_, cols_;
  std::vector<std::unique_ptr<uint8_t[]>> storage_;
  std::vector<void*> pointers_;
  std::vector<size_t> sizes_;
  std::vector<BufferRole> roles_;
};

// The codes of a weight in panels, as core/layout.h says, and that weight.
class InPanels {
 public:
  explicit InPanels(const PackedView& w)
      : codes_(static_cast<size_t>(w.rows * w.row_bytes)), view_(w) {
    uint8_t* to = codes_.data();
    const int64_t low = w.bits == 3 ? w.plane_bytes : w.row_bytes;
    for (int64_t row = 0; row < w.rows; row += kPanelHeight) {
      to = place(w, row, 0, low, 4, to);
      to = place(w, row, low, w.row_bytes, 2, to);
    }
    view_.codes = codes_.data();
    view_.layout = Layout::kPanels;
  }
  InPanels(const InPanels&) = delete;
  const PackedView& view() const { return view_; }

 private:
  // The bytes [begin, end) of sixteen rows, `piece` of them at a time.
  static uint8_t* place(const PackedView& w, int64_t row, int64_t begin, int64_t end, int64_t piece,
                        uint8_t* to) {
    for (int64_t at = begin; at < end; at += piece) {
      for (int64_t i = 0; i < kPanelHeight; ++i, to += piece)
        memcpy(to, w.codes + (row + i) * w.row_bytes + at, static_cast<size_t>(piece));
    }
    return to;
  }

  std::vector<uint8_t> codes_;
  PackedView view_;
};

inline double squared_error(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
  return sum;
}

// The kernels that BITFOLD_ISA names, or the best ones. Where the CPU lacks them the sentence is
// printed, which CTest counts as a skip.
inline const KernelTable& active_kernels() {
  Status status;
  const InstructionSet* isa = active_instruction_set(&status);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    std::exit(77);
  }
  return *isa->table;
}

// As many pieces as there are items up to 5, whatever the grain, each in a thread of its own.
inline void run_in_threads(int64_t n, int64_t /*grain*/, const RangeBody& body) {
  const int64_t pieces = std::min<int64_t>(n, 5);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < pieces; ++i) {
    threads.emplace_back([&, i] { body(n * i / pieces, n * (i + 1) / pieces); });
  }
  for (std::thread& thread : threads) thread.join();
}

inline constexpr double kRound =
    5.9604644775390625e-08;  // 2^-24: half a unit in the last place of 1

// What rounding the result to `dtype` once may cost.
inline double store_error(FloatType dtype, double value) {
  const double magnitude = std::fabs(value);
  switch (dtype) {
    case FloatType::kFloat32:
      return magnitude * kRound;
    case FloatType::kFloat16:
      return std::max(magnitude * 0x1p-11, 0x1p-25);
    case FloatType::kBFloat16:
      return magnitude * 0x1p-8;
  }
  return 0.0;
}

inline std::vector<uint16_t> to_bits16(const std::vector<float>& values, FloatType dtype) {
  std::vector<uint16_t> bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    bits[i] =
        dtype == FloatType::kFloat16 ? float_to_half(values[i]) : float_to_bfloat16(values[i]);
  }
  return bits;
}
inline float from_bits16(uint16_t bits, FloatType dtype) {
  return dtype == FloatType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

}  // namespace bitfold::testing
