#include "core/format.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <iterator>

#include "core/bitpack.h"

namespace bitfold {
namespace {

std::string quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

std::string code_names() {
  std::string names;
  for (const ElementCode& element : element_codes()) {
    if (!names.empty()) names += ", ";
    names += element.name;
  }
  return names;
}

Status bad_format(std::string_view text, const std::string& why) {
  return Status::error(StatusCode::kInvalidFormat, "format " + quoted(text) + ": " + why);
}

const char* zero_token(Zero zero) {
  switch (zero) {
    case Zero::kNone:
      return "sym";
    case Zero::kInt:
      return "zp";
    case Zero::kFloat:
      return "fz";
    case Zero::kMidrise:
      return "midrise";
  }
  return "";
}

bool parse_group_size(std::string_view token, int64_t* size) {
  if (token.size() < 2 || token[0] != 'g') return false;
  const char* end = token.data() + token.size();
  const auto [stop, error] = std::from_chars(token.data() + 1, end, *size);
  return error == std::errc() && stop == end && token[1] != '0';
}

// "outliers", or "outliers" with a number per mille.
bool parse_outliers(std::string_view token, int* per_mille) {
  constexpr std::string_view kWord = "outliers";
  if (!token.starts_with(kWord)) return false;
  *per_mille = kDefaultOutliers;
  const std::string_view number = token.substr(kWord.size());
  if (number.empty()) return true;
  const char* end = number.data() + number.size();
  const auto [stop, error] = std::from_chars(number.data(), end, *per_mille);
  return error == std::errc() && stop == end && number[0] != '0';
}

// What stores codes, scales and zero points.
BufferTable dense_buffers(const Format& format, int64_t rows, int64_t cols) {
  const int64_t scale_r = format.scale_rows(rows);
  const int64_t groups = format.groups_per_row(cols);
  BufferTable specs;
  specs.push_back(
      {BufferRole::kCodes, "", DType::kInt8, {rows * packed_row_bytes(cols, format.bits())}});
  if (format.family() == Family::kLearnedCodebook) {
    specs.push_back({BufferRole::kCodebook,
                     "_codebook",
                     DType::kInt16,
                     {scale_r, int64_t{1} << format.bits()}});
    specs.push_back({BufferRole::kExponent, "_exponent", DType::kInt8, {1}});
    return specs;
  }
  if (format.double_quant) {
    const int64_t blocks = (scale_r * groups + kDoubleQuantBlock - 1) / kDoubleQuantBlock;
    specs.push_back({BufferRole::kScale, "_scale", DType::kInt8, {scale_r, groups}});
    specs.push_back({BufferRole::kScaleAbsmax, "_scale_absmax", DType::kInt32, {blocks}});
    specs.push_back({BufferRole::kScaleOffset, "_scale_offset", DType::kInt32, {1}});
  } else if (format.family() == Family::kInteger) {
    specs.push_back({BufferRole::kScale, "_scale", DType::kInt16, {scale_r, groups}});
    specs.push_back({BufferRole::kExponent, "_exponent", DType::kInt8, {1}});
  } else {
    specs.push_back({BufferRole::kScale, "_scale", DType::kInt32, {scale_r, groups}});
  }
  if (format.zero == Zero::kInt) {
    specs.push_back({BufferRole::kZero,
                     "_zero",
                     DType::kInt8,
                     {scale_r * packed_row_bytes(groups, format.bits())}});
  } else if (format.zero == Zero::kFloat) {
    specs.push_back({BufferRole::kZero, "_zero", DType::kInt16, {scale_r, groups}});
  }
  return specs;
}

}  // namespace

const ElementCode kElementCodes[] = {
#include "core/format_table.inc"
};
const size_t kElementCodeCount = std::size(kElementCodes);

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kInt8:
      return 1;
    case DType::kInt16:
      return 2;
    case DType::kInt32:
      return 4;
  }
  return 0;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kInt8:
      return "int8";
    case DType::kInt16:
      return "int16";
    case DType::kInt32:
      return "int32";
  }
  return "";
}

int64_t BufferSpec::numel() const {
  int64_t n = 1;
  for (int64_t extent : shape) n *= extent;
  return n;
}

Status Format::parse(std::string_view text, Format* out) {
  const size_t head_end = std::min(text.find('-'), text.size());
  const std::string_view head = text.substr(0, head_end);
  Format format;
  format.code = -1;
  const auto table = element_codes();
  for (size_t i = 0; i < table.size(); ++i) {
    if (head == table[i].name) format.code = static_cast<int>(i);
  }
  if (format.code < 0) {
    return bad_format(text,
                      "unknown element code " + quoted(head) + "; known codes: " + code_names());
  }
  const ElementCode& element = format.element();
  format.grouping = element.grouping;
  format.group_size = element.group_size;
  format.zero = element.zero;
  format.double_quant = element.double_quant;

  bool grouping_seen = false, zero_seen = false, quant_seen = false, outliers_seen = false;
  const auto once = [&](bool* seen, std::string_view token, const char* what) {
    if (*seen)
      return bad_format(text, quoted(token) + " is a second option for the " + what + "; give one");
    *seen = true;
    return Status::success();
  };
  for (size_t at = head_end; at < text.size();) {
    const size_t end = std::min(text.find('-', at + 1), text.size());
    const std::string_view token = text.substr(at + 1, end - at - 1);
    at = end;
    Status status;
    int64_t size = 0;
    if (token == "row" || token == "tensor") {
      status = once(&grouping_seen, token, "grouping (gN, row, tensor)");
      format.grouping = token == "row" ? Grouping::kRow : Grouping::kTensor;
      format.group_size = 0;
    } else if (parse_group_size(token, &size)) {
      status = once(&grouping_seen, token, "grouping (gN, row, tensor)");
      if (element.family == Family::kLearnedCodebook) {
        return bad_format(text, quoted(token) + " is impossible: " + element.name +
                                    " learns its codebook per 'row' or per 'tensor'");
      }
      if (size < kMinGroupSize || size > kMaxGroupSize || size % kMinGroupSize != 0) {
        return bad_format(text, "group size " + std::to_string(size) +
                                    " must be a multiple of 16 from 16 to 65536");
      }
      format.grouping = Grouping::kGroup;
      format.group_size = size;
    } else if (token == "sym" || token == "zp" || token == "fz" || token == "midrise") {
      status = once(&zero_seen, token, "zero point (sym, zp, fz, midrise)");
      if (element.family != Family::kInteger) {
        return bad_format(text,
                          quoted(token) + " is impossible: " + element.name + " has no zero point");
      }
      for (Zero zero : {Zero::kNone, Zero::kInt, Zero::kFloat, Zero::kMidrise}) {
        if (token == zero_token(zero)) format.zero = zero;
      }
    } else if (token == "dq" || token == "nodq") {
      status = once(&quant_seen, token, "double quantization (dq, nodq)");
      if (element.family == Family::kLearnedCodebook) {
        return bad_format(text,
                          quoted(token) + " is impossible: " + element.name + " has no scales");
      }
      format.double_quant = token == "dq";
    } else if (parse_outliers(token, &format.outliers)) {
      status = once(&outliers_seen, token, "outliers (outliers, outliersN)");
      if (format.outliers < 1 || format.outliers > kMaxOutliers) {
        return bad_format(text, quoted(token) + ": outliers are counted per mille, from 1 to 100");
      }
    } else {
      return bad_format(text, "unknown option " + quoted(token) +
                                  "; allowed: gN, row, tensor, sym, zp, fz, midrise, dq, nodq, "
                                  "outliersN");
    }
    if (!status.ok()) return status;
  }
  if (format.grouping == Grouping::kTensor && format.double_quant) {
    if (quant_seen)
      return bad_format(text,
                        "'dq' is impossible with 'tensor': there is one scale, nothing to fold");
    format.double_quant = false;
  }
  *out = format;
  return Status::success();
}

std::string Format::to_string() const {
  const ElementCode& e = element();
  std::string text = e.name;
  // Integer grids and learned codebooks always say their grouping; table codes are known by the
  // bare name.
  const bool default_grouping = grouping == e.grouping && group_size == e.group_size;
  if (!default_grouping || e.family != Family::kFixedCodebook) {
    if (grouping == Grouping::kRow) text += "-row";
    if (grouping == Grouping::kTensor) text += "-tensor";
    if (grouping == Grouping::kGroup) text += "-g" + std::to_string(group_size);
  }
  if (zero != e.zero) text += std::string("-") + zero_token(zero);
  const bool implied_quant = e.double_quant && grouping != Grouping::kTensor;
  if (double_quant != implied_quant) text += double_quant ? "-dq" : "-nodq";
  if (outliers > 0) text += "-outliers";
  if (outliers > 0 && outliers != kDefaultOutliers) text += std::to_string(outliers);
  return text;
}

// Parsing a string gives the reasons; every op call asks only this. A test holds the two together
// over all combinations.
bool Format::is_possible() const {
  const bool sized = grouping == Grouping::kGroup;
  const bool learned = family() == Family::kLearnedCodebook;
  if (outliers < 0 || outliers > kMaxOutliers) return false;
  if (sized ? group_size < kMinGroupSize || group_size > kMaxGroupSize ||
                  group_size % kMinGroupSize != 0
            : group_size != 0) {
    return false;
  }
  if (family() != Family::kInteger && zero != Zero::kNone) return false;
  if (double_quant && (learned || grouping == Grouping::kTensor)) return false;
  return !(learned && sized);
}

int64_t Format::groups_per_row(int64_t cols) const {
  return grouping == Grouping::kGroup ? (cols + group_size - 1) / group_size : 1;
}

Format Format::dense() const {
  Format format = *this;
  format.outliers = 0;
  return format;
}

BufferTable Format::buffers(int64_t rows, int64_t cols) const {
  BufferTable specs = dense_buffers(*this, rows, cols);
  if (outliers == 0) return specs;
  const int64_t count = outlier_count(rows, cols);
  const DType column = cols <= kMaxShortColumns ? DType::kInt16 : DType::kInt32;
  specs.push_back({BufferRole::kOutlierValue, "_outlier_value", DType::kInt16, {count}});
  specs.push_back({BufferRole::kOutlierColumn, "_outlier_column", column, {count}});
  specs.push_back({BufferRole::kOutlierRow, "_outlier_row", DType::kInt32, {rows + 1}});
  specs.push_back({BufferRole::kOutlierExponent, "_outlier_exponent", DType::kInt8, {1}});
  return specs;
}

int64_t Format::nbytes(int64_t rows, int64_t cols) const {
  int64_t total = 0;
  for (const BufferSpec& spec : buffers(rows, cols)) total += spec.nbytes();
  return total;
}

Status check_shape(int64_t rows, int64_t cols) {
  if (rows >= 1 && cols >= 1 && rows <= kMaxWeights / cols) return Status::success();
  return Status::error(
      StatusCode::kInvalidArgument,
      "shape must be (out, in), both at least 1 and their product at most 2^48, got (" +
          std::to_string(rows) + ", " + std::to_string(cols) + ")");
}

Status check_shape(const Format& format, int64_t rows, int64_t cols) {
  Status status = check_shape(rows, cols);
  if (!status.ok() || format.outliers == 0) return status;
  if (cols <= INT32_MAX && format.outlier_count(rows, cols) <= INT32_MAX) return status;
  return Status::error(StatusCode::kInvalidArgument,
                       "shape (" + std::to_string(rows) + ", " + std::to_string(cols) +
                           ") is too large for " + format.to_string() +
                           ": columns and outliers are counted in 32 bits");
}

Spec make_spec(const Format& format, int64_t rows, int64_t cols) {
  return {format.code,
          static_cast<int64_t>(format.grouping),
          format.group_size,
          static_cast<int64_t>(format.zero),
          format.double_quant,
          format.outliers,
          rows,
          cols};
}

Status parse_spec(const std::vector<int64_t>& spec, Format* format, int64_t* rows, int64_t* cols) {
  const auto bad = [](const std::string& why) {
    return Status::error(StatusCode::kInvalidArgument,
                         "spec " + why + "; take it from Format.spec((out, in))");
  };
  if (spec.size() != kSpecLength) {
    return bad("must hold " + std::to_string(kSpecLength) + " ints, got " +
               std::to_string(spec.size()));
  }
  const auto in_range = [](int64_t value, int64_t end) { return value >= 0 && value < end; };
  if (!in_range(spec[0], static_cast<int64_t>(element_codes().size())) || !in_range(spec[1], 3) ||
      !in_range(spec[3], 4) || !in_range(spec[4], 2) || !in_range(spec[5], kMaxOutliers + 1)) {
    return bad("holds an unknown code, grouping, zero, scale encoding or share of outliers");
  }
  format->code = static_cast<int>(spec[0]);
  format->grouping = static_cast<Grouping>(spec[1]);
  format->group_size = spec[2];
  format->zero = static_cast<Zero>(spec[3]);
  format->double_quant = spec[4] != 0;
  format->outliers = static_cast<int>(spec[5]);
  *rows = spec[6];
  *cols = spec[7];
  if (!format->is_possible()) return bad("describes an impossible format");
  return check_shape(*format, *rows, *cols);
}

}  // namespace bitfold
