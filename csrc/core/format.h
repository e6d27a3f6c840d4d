// How one matrix is stored. A Format is a value: it prints to and parses from one short string, and
// everything about the bytes (which buffers, their types and shapes, their size) follows from it
// and the logical shape [rows, cols] = [out, in].
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/codebook.h"
#include "core/short_list.h"
#include "core/status.h"

namespace bitfold {

enum class Family : uint8_t { kInteger, kFixedCodebook, kLearnedCodebook };
enum class Grouping : uint8_t {
  kGroup,
  kRow,
  kTensor
};  // which weights share a scale (or a learned codebook)
enum class Zero : uint8_t {
  kNone,     // integer grid around code 2^(b-1)
  kInt,      // integer zero point of b bits per group
  kFloat,    // real zero point, fp16, per group (HQQ)
  kMidrise,  // integer grid around 2^(b-1) - 1/2: no zero level, symmetric
};
enum class Method : uint8_t {
  kRound,
  kSearch
};  // scale from absmax or min-max; scale by squared error

// One row of the table of element codes: what a code is and what a bare name stands for.
struct ElementCode {
  const char* name;
  int bits;
  Family family;
  const Codebook* codebook;  // kFixedCodebook only
  Grouping grouping;         // default
  int group_size;            // default, if grouping is kGroup
  Zero zero;                 // default
  bool double_quant;         // default
  Method method;             // default
  const char* remark;
};

// Ordered; the index is what `spec` carries between Python and C++. It is never stored: files hold
// the string.
extern const ElementCode kElementCodes[];
extern const size_t kElementCodeCount;
inline std::span<const ElementCode> element_codes() { return {kElementCodes, kElementCodeCount}; }

enum class DType : uint8_t { kInt8, kInt16, kInt32 };
int64_t size_of(DType dtype);
const char* name_of(DType dtype);

enum class BufferRole : uint8_t {
  kCodes,
  kScale,
  kScaleAbsmax,
  kScaleOffset,
  kZero,
  kExponent,
  kCodebook,
  kOutlierValue,
  kOutlierColumn,
  kOutlierRow,
  kOutlierExponent
};

struct BufferSpec {
  BufferRole role;
  const char* suffix;  // appended to the parameter's name: weight, weight_scale, …
  DType dtype;
  ShortList<int64_t, 2> shape;
  int64_t numel() const;
  int64_t nbytes() const { return numel() * size_of(dtype); }
};

// At most codes, scale, its absmax and offset, zero, and four of outliers.
inline constexpr size_t kMaxBuffers = 9;
using BufferTable = ShortList<BufferSpec, kMaxBuffers>;

struct Format {
  int code = 0;  // index in element_codes()
  Grouping grouping = Grouping::kGroup;
  int64_t group_size = 64;  // 0 unless grouping is kGroup
  Zero zero = Zero::kNone;
  bool double_quant = false;
  int outliers = 0;  // weights per mille that also have a sparse fp16 value; 0: there is none

  static Status parse(std::string_view text, Format* out);
  std::string to_string() const;
  bool is_possible() const;  // whether some string names it; the cheap form of parsing to_string()
  bool operator==(const Format&) const = default;

  const ElementCode& element() const { return kElementCodes[code]; }
  int bits() const { return element().bits; }
  Family family() const { return element().family; }

  int64_t groups_per_row(int64_t cols) const;
  int64_t scale_rows(int64_t rows) const { return grouping == Grouping::kTensor ? 1 : rows; }
  int64_t outlier_count(int64_t rows, int64_t cols) const {
    return (rows * cols * outliers + 999) / 1000;
  }
  Format dense() const;  // the same without outliers; its buffers are the first ones of this one
  BufferTable buffers(int64_t rows, int64_t cols) const;
  int64_t nbytes(int64_t rows, int64_t cols) const;
};

// Rows and columns at least 1, and few enough weights that no byte count overflows.
inline constexpr int64_t kMaxWeights = int64_t{1} << 48;
Status check_shape(int64_t rows, int64_t cols);
// For formats with outliers also: columns and the number of outliers must fit 32 bits.
Status check_shape(const Format& format, int64_t rows, int64_t cols);

inline constexpr int64_t kMinGroupSize = 16;  // one vector of 16 weights never crosses a group
inline constexpr int64_t kMaxGroupSize = 65536;
inline constexpr int64_t kDoubleQuantBlock = 256;
inline constexpr int kDefaultOutliers = 10, kMaxOutliers = 100;  // per mille
inline constexpr int64_t kMaxShortColumns = 65536;               // columns of outliers in 16 bits

// The ints that ops take: code, grouping, group_size, zero, double_quant, outliers, rows, cols.
inline constexpr size_t kSpecLength = 8;
using Spec = std::array<int64_t, kSpecLength>;
Spec make_spec(const Format& format, int64_t rows, int64_t cols);
Status parse_spec(const std::vector<int64_t>& spec, Format* format, int64_t* rows, int64_t* cols);

}  // namespace bitfold
