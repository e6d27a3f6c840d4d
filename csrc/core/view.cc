#include "core/view.h"

#include <algorithm>
#include <cmath>

#include "core/bitpack.h"
#include "core/float16.h"
#include "core/unread_view.h"

namespace bitfold {

PackedView make_view(const Format& format, int64_t rows, int64_t cols, const void* const* buffers) {
  ValueAddresses at{};
  PackedView view = make_unread_view(format, rows, cols, buffers, &at);
  if (at.scale_offset) view.scale_offset = *at.scale_offset;
  if (at.exponent) view.factor = std::ldexp(1.0f, *at.exponent);
  if (at.outlier_exponent) view.outliers.factor = std::ldexp(1.0f, *at.outlier_exponent);
  return view;
}

PackedView make_unread_view(const Format& format, int64_t rows, int64_t cols,
                            const void* const* buffers, ValueAddresses* addresses) {
  PackedView view{};
  view.bits = format.bits();
  view.family = format.family();
  view.scale_kind = format.family() == Family::kLearnedCodebook ? ScaleKind::kNone
                    : format.double_quant                       ? ScaleKind::kDoubleQuant
                    : format.family() == Family::kInteger       ? ScaleKind::kFp16
                                                                : ScaleKind::kFp32;
  view.zero_kind = format.zero;
  view.rows = rows;
  view.cols = cols;
  view.groups = format.groups_per_row(cols);
  view.group_size = format.grouping == Grouping::kGroup ? format.group_size : cols;
  view.row_bytes = packed_row_bytes(cols, view.bits);
  view.plane_bytes = view.bits == 3 ? (cols + 3) / 4 : 0;
  const bool per_tensor = format.grouping == Grouping::kTensor;
  view.scale_row_stride = per_tensor ? 0 : view.groups;
  view.zero_row_bytes = per_tensor ? 0 : packed_row_bytes(view.groups, view.bits);
  view.factor = 1.0f;
  view.outliers.factor = 1.0f;
  if (format.family() == Family::kFixedCodebook) view.levels = format.element().codebook->levels;

  size_t i = 0;
  for (const BufferSpec& spec : format.buffers(rows, cols)) {
    const void* data = buffers[i++];
    switch (spec.role) {
      case BufferRole::kCodes:
        view.codes = static_cast<const uint8_t*>(data);
        break;
      case BufferRole::kScale:
        view.scale = data;
        break;
      case BufferRole::kScaleAbsmax:
        view.scale_absmax = static_cast<const float*>(data);
        break;
      case BufferRole::kScaleOffset:
        addresses->scale_offset = static_cast<const float*>(data);
        break;
      case BufferRole::kZero:
        view.zero = data;
        break;
      case BufferRole::kExponent:
        addresses->exponent = static_cast<const int8_t*>(data);
        break;
      case BufferRole::kCodebook:
        view.codebook = static_cast<const uint16_t*>(data);
        break;
      case BufferRole::kOutlierValue:
        view.outliers.value = static_cast<const uint16_t*>(data);
        view.outliers.count = spec.numel();
        break;
      case BufferRole::kOutlierColumn:
        view.outliers.column = data;
        view.outliers.wide = spec.dtype == DType::kInt32;
        break;
      case BufferRole::kOutlierRow:
        view.outliers.row = static_cast<const int32_t*>(data);
        break;
      case BufferRole::kOutlierExponent:
        addresses->outlier_exponent = static_cast<const int8_t*>(data);
        break;
    }
  }
  return view;
}

float scale_of(const PackedView& view, int64_t row, int64_t group) {
  const int64_t at = row * view.scale_row_stride + group;
  switch (view.scale_kind) {
    case ScaleKind::kFp32:
      return static_cast<const float*>(view.scale)[at];
    case ScaleKind::kFp16:
      return half_to_float(static_cast<const uint16_t*>(view.scale)[at]) * view.factor;
    case ScaleKind::kDoubleQuant: {
      const float level = kDynamicMap[static_cast<const uint8_t*>(view.scale)[at]];
      return level * view.scale_absmax[at / kDoubleQuantBlock] + view.scale_offset;
    }
    case ScaleKind::kNone:
      return 1.0f;
  }
  return 0.0f;
}

float zero_of(const PackedView& view, int64_t row, int64_t group) {
  const float middle = static_cast<float>(1 << (view.bits - 1));
  switch (view.zero_kind) {
    case Zero::kNone:
      return middle;
    case Zero::kMidrise:
      return middle - 0.5f;
    case Zero::kInt: {
      const uint8_t* packed = static_cast<const uint8_t*>(view.zero) + row * view.zero_row_bytes;
      return static_cast<float>(extract_code(packed, view.groups, view.bits, group));
    }
    case Zero::kFloat:
      return half_to_float(
          static_cast<const uint16_t*>(view.zero)[row * view.scale_row_stride + group]);
  }
  return 0.0f;
}

float level_of(const PackedView& view, int64_t row, unsigned code) {
  if (view.family == Family::kFixedCodebook) return view.levels[code];
  return half_to_float(view.codebook[row * view.scale_row_stride * (1 << view.bits) + code]) *
         view.factor;
}

OutlierRange outliers_of(const OutlierView& outliers, int64_t row) {
  if (outliers.count == 0) return {0, 0};
  const int64_t begin = std::clamp<int64_t>(outliers.row[row], 0, outliers.count);
  return {begin, std::clamp<int64_t>(outliers.row[row + 1], begin, outliers.count)};
}

int64_t outlier_column(const PackedView& view, int64_t i) {
  const void* column = view.outliers.column;
  const int64_t at = view.outliers.wide ? int64_t{static_cast<const int32_t*>(column)[i]}
                                        : int64_t{static_cast<const uint16_t*>(column)[i]};
  return at < view.cols ? std::max<int64_t>(at, -1) : -1;
}

}  // namespace bitfold
