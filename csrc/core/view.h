// Borrowed memory: what a kernel sees of a float matrix and of a packed weight. Pointers and sizes
// only; nothing here owns.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "core/layout.h"

namespace bitfold {

enum class FloatType : uint8_t { kFloat32, kFloat16, kBFloat16 };

inline int64_t size_of(FloatType dtype) { return dtype == FloatType::kFloat32 ? 4 : 2; }
inline void* advance(void* data, FloatType dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}
inline const void* advance(const void* data, FloatType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * size_of(dtype);
}

struct MatrixView {
  const void* data;
  FloatType dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // in elements
};

enum class ScaleKind : uint8_t { kFp32, kFp16, kDoubleQuant, kNone };

// Values that are added to what the codes stand for, sparse: row r has those from row[r] to
// row[r + 1] (CSR). count is 0 where the format has none. The bytes may come from a file that lies:
// OutlierReader (cpu/outliers.h) doubts them.
struct OutlierView {
  int64_t count;
  const uint16_t* value;  // [count] half bits
  const void* column;     // [count] uint16_t, or int32_t where `wide`
  const int32_t* row;     // [rows + 1]
  float factor;           // 2^exponent, multiplies the values
  bool wide;
};

// A packed weight, flattened for inner loops. value(r, c) = (code - zero) * scale for integer
// grids, levels[code] * scale for codebooks; see docs/format.md.
struct PackedView {
  int bits;
  Family family;
  ScaleKind scale_kind;
  Zero zero_kind;
  Layout layout;
  int64_t rows, cols;
  int64_t group_size;        // cols where one group spans the row
  int64_t groups;            // per row
  int64_t row_bytes;         // codes
  int64_t plane_bytes;       // 3 bits: length of the first plane; else 0
  int64_t scale_row_stride;  // groups, or 0 where one scale (or codebook) serves the tensor
  int64_t zero_row_bytes;    // integer zeros, packed like codes; 0 where one serves the tensor

  const uint8_t* codes;
  const void*
      scale;  // by scale_kind: float, half bits, or double-quantization codes [scale rows, groups]
  const float* scale_absmax;  // [blocks of 256], kDoubleQuant
  float scale_offset;         // kDoubleQuant
  float factor;               // 2^exponent: multiplies fp16 scales and learned codebooks
  const void* zero;           // packed integers or half bits
  const uint16_t* codebook;   // half bits [scale rows, 2^bits], learned
  const float* levels;        // [2^bits], fixed codebook

  OutlierView outliers;  // kernels do not see them: cpu/outliers.h and decoder.h add them
};

// `buffers` in the order of Format::buffers. Values behind _offset and _exponent are read now.
PackedView make_view(const Format& format, int64_t rows, int64_t cols, const void* const* buffers);

// Scale and zero point of one group, in float arithmetic alone, exactly as every kernel computes
// them.
float scale_of(const PackedView& view, int64_t row, int64_t group);
float zero_of(const PackedView& view, int64_t row, int64_t group);
float level_of(const PackedView& view, int64_t row, unsigned code);

// Where outliers of a row lie, and the column of one, -1 where it is none of the weight's: always
// within the buffers, whatever they hold.
struct OutlierRange {
  int64_t begin, end;
};
OutlierRange outliers_of(const OutlierView& outliers, int64_t row);
int64_t outlier_column(const PackedView& view, int64_t i);

}  // namespace bitfold
