#include "core/format.h"

#include <algorithm>

#include "core/bitpack.h"
#include "support.h"

namespace bitfold {
namespace {

using testing::every_format;
using testing::format_of;

std::string error_of(const std::string& text) {
  Format format;
  const Status status = Format::parse(text, &format);
  EXPECT_FALSE(status.ok()) << text;
  EXPECT_EQ(status.code, StatusCode::kInvalidFormat);
  return status.message;
}

TEST(Format, PrintsWhatItParses) {
  ASSERT_GT(every_format().size(), 200u);
  for (const std::string& text : every_format()) {
    const Format format = format_of(text);
    EXPECT_EQ(format.to_string(), text);
    EXPECT_EQ(format_of(format.to_string()), format);
  }
}

TEST(Format, OptionsMayComeInAnyOrder) {
  EXPECT_EQ(format_of("int4-sym-g128-dq"), format_of("int4-g128-sym-dq"));
  EXPECT_EQ(format_of("nf4-nodq-g128").to_string(), "nf4-g128-nodq");
  EXPECT_EQ(format_of("int4-outliers5-sym").to_string(), "int4-g64-sym-outliers5");
}

TEST(Format, BareNamesHaveDefaults) {
  EXPECT_EQ(format_of("nf4").to_string(), "nf4");
  EXPECT_TRUE(format_of("nf4").double_quant);
  EXPECT_EQ(format_of("nf4-g64-dq").to_string(), "nf4");
  EXPECT_EQ(format_of("int8").to_string(), "int8-row");
  EXPECT_EQ(format_of("int8-sym").to_string(), "int8-row");
  EXPECT_EQ(format_of("int4").to_string(), "int4-g64");
  EXPECT_EQ(format_of("int2-midrise").to_string(), "int2-g64");
  EXPECT_EQ(format_of("kmeans4").to_string(), "kmeans4-row");
  EXPECT_EQ(format_of("nf4-tensor").to_string(), "nf4-tensor");
  EXPECT_FALSE(format_of("nf4-tensor").double_quant);
  EXPECT_EQ(format_of("nf4").outliers, 0);
  EXPECT_EQ(format_of("nf4-outliers").outliers, 10);
  EXPECT_EQ(format_of("nf4-outliers10").to_string(), "nf4-outliers");
}

TEST(Format, ErrorsNameTheToken) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> cases = {
      {"", {"''", "known codes", "nf4"}},
      {"nf5", {"'nf5'", "nf4", "kmeans2"}},
      {"NF4", {"'NF4'"}},
      {"int4-g65", {"65", "multiple of 16"}},
      {"int4-g8", {"group size 8", "16 to 65536"}},
      {"int4-g131072", {"131072"}},
      {"int4-g0", {"'g0'", "allowed"}},
      {"int4-g064", {"'g064'"}},
      {"int4-g-64", {"'g'"}},
      {"int4-g99999999999999999999", {"'g99999999999999999999'"}},
      {"int4-g64-g64", {"'g64'", "second option", "grouping"}},
      {"int4-row-tensor", {"'tensor'", "second option"}},
      {"int4-sym-fz", {"'fz'", "second option", "zero point"}},
      {"int4-dq-nodq", {"'nodq'", "second option"}},
      {"nf4-sym", {"'sym'", "impossible", "nf4"}},
      {"kmeans4-g64", {"'g64'", "impossible", "'row'"}},
      {"kmeans4-dq", {"'dq'", "impossible", "no scales"}},
      {"kmeans4-zp", {"'zp'", "impossible"}},
      {"int4-tensor-dq", {"'dq'", "impossible", "'tensor'"}},
      {"int4-outliers0", {"'outliers0'", "allowed"}},
      {"int4-outliers101", {"'outliers101'", "per mille", "1 to 100"}},
      {"int4-outliers-1", {"'1'", "outliersN"}},
      {"int4-outliers05", {"'outliers05'"}},
      {"int4-outliers99999999999", {"'outliers99999999999'"}},
      {"nf4-outliers-outliers5", {"'outliers5'", "second option", "outliers"}},
      {"int4-", {"''", "allowed"}},
      {"int4--g64", {"''"}},
      {"int4-g64 ", {"'g64 '"}},
      {"int4_g64", {"'int4_g64'"}},
      {"int4-fast", {"'fast'", "gN, row, tensor, sym, zp, fz, midrise, dq, nodq"}},
  };
  for (const auto& [text, words] : cases) {
    const std::string message = error_of(text);
    for (const std::string& word : words) {
      EXPECT_NE(message.find(word), std::string::npos)
          << "'" << text << "' says: " << message << "; lacks " << word;
    }
  }
}

TEST(Format, RandomTextNeverCrashesAndWhatParsesRoundTrips) {
  std::mt19937 rng(1);
  const std::vector<std::string> pieces = {"nf4",  "int4", "kmeans3", "-",      "--",  "g",
                                           "64",   "g64",  "row",     "tensor", "sym", "dq",
                                           "nodq", "zp",   "\0",      "é"};
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (unsigned j = rng() % 6; j > 0; --j) text += pieces[rng() % pieces.size()];
    Format format;
    if (Format::parse(text, &format).ok()) {
      EXPECT_EQ(format_of(format.to_string()), format);
    }
  }
}

TEST(Format, BuffersFollowFromFormatAndShape) {
  const auto shapes = [](const std::string& text, int64_t rows, int64_t cols) {
    std::string all;
    for (const BufferSpec& spec : format_of(text).buffers(rows, cols)) {
      all += std::string(spec.suffix) + ":" + name_of(spec.dtype);
      for (int64_t extent : spec.shape) all += "," + std::to_string(extent);
      all += " ";
    }
    return all;
  };
  EXPECT_EQ(shapes("nf4", 5, 197),
            ":int8,495 _scale:int8,5,4 _scale_absmax:int32,1 _scale_offset:int32,1 ");
  EXPECT_EQ(shapes("nf4-nodq", 5, 197), ":int8,495 _scale:int32,5,4 ");
  EXPECT_EQ(shapes("int4-g64", 5, 197),
            ":int8,495 _scale:int16,5,4 _exponent:int8,1 _zero:int8,10 ");
  EXPECT_EQ(shapes("int4-g64-fz", 5, 197),
            ":int8,495 _scale:int16,5,4 _exponent:int8,1 _zero:int16,5,4 ");
  EXPECT_EQ(shapes("int3-g64-dq", 5, 197),
            ":int8,375 _scale:int8,5,4 _scale_absmax:int32,1 _scale_offset:int32,1 _zero:int8,10 ");
  EXPECT_EQ(shapes("int2-g64", 5, 197), ":int8,250 _scale:int16,5,4 _exponent:int8,1 ");
  EXPECT_EQ(shapes("int8-tensor-zp", 5, 197),
            ":int8,985 _scale:int16,1,1 _exponent:int8,1 _zero:int8,1 ");
  EXPECT_EQ(shapes("kmeans3-row", 5, 197), ":int8,375 _codebook:int16,5,8 _exponent:int8,1 ");
  EXPECT_EQ(shapes("kmeans2-tensor", 5, 197), ":int8,250 _codebook:int16,1,4 _exponent:int8,1 ");
  EXPECT_EQ(shapes("nf4", 1000, 128),
            ":int8,64000 _scale:int8,1000,2 _scale_absmax:int32,8 _scale_offset:int32,1 ");
  EXPECT_EQ(shapes("int4-tensor-outliers", 5, 197),
            ":int8,495 _scale:int16,1,1 _exponent:int8,1 _zero:int8,1 _outlier_value:int16,10 "
            "_outlier_column:int16,10 _outlier_row:int32,6 _outlier_exponent:int8,1 ");
  EXPECT_EQ(shapes("int8-outliers1", 1, 65537),
            ":int8,65537 _scale:int16,1,1 _exponent:int8,1 _outlier_value:int16,66 "
            "_outlier_column:int32,66 _outlier_row:int32,2 _outlier_exponent:int8,1 ");
}

TEST(Format, DenseBuffersComeFirst) {
  for (const std::string& text : every_format()) {
    const Format format = format_of(text), dense = format.dense();
    EXPECT_EQ(dense.outliers, 0);
    const BufferTable all = format.buffers(5, 197), first = dense.buffers(5, 197);
    ASSERT_EQ(all.size(), first.size() + (format.outliers > 0 ? 4 : 0));
    for (size_t i = 0; i < first.size(); ++i) EXPECT_STREQ(all[i].suffix, first[i].suffix);
  }
}

TEST(Format, ShapesThatOutliersCannotCountAreRefused) {
  const int64_t rows = 1 << 20, cols = 1 << 20;
  EXPECT_TRUE(check_shape(format_of("int4-outliers1"), rows, cols).ok());
  for (const auto& [r, c] : {std::pair{rows, cols}, {int64_t{1}, int64_t{INT32_MAX} + 1}}) {
    const Status status = check_shape(format_of("int4-outliers"), r, c);
    EXPECT_NE(status.message.find("too large for int4-g64-outliers"), std::string::npos);
    EXPECT_TRUE(check_shape(format_of("int4"), r, c).ok());
  }
}

TEST(Format, TheLongestTableFillsItsList) {
  size_t longest = 0;
  for (const std::string& text : every_format())
    longest = std::max(longest, format_of(text).buffers(5, 197).size());
  EXPECT_EQ(longest, kMaxBuffers);
}

TEST(Format, BytesAreTheSumOfTheBuffersBeyond32Bits) {
  for (const std::string& text : every_format()) {
    const Format format = format_of(text);
    int64_t total = 0;
    for (const BufferSpec& spec : format.buffers(70001, 65537)) total += spec.nbytes();
    EXPECT_EQ(format.nbytes(70001, 65537), total);
    EXPECT_GE(total, 70001 * packed_row_bytes(65537, format.bits()));
  }
}

TEST(Spec, CarriesEveryFormat) {
  for (const std::string& text : every_format()) {
    const Spec spec = make_spec(format_of(text), 12, 345);
    Format format;
    int64_t rows = 0, cols = 0;
    ASSERT_TRUE(parse_spec({spec.begin(), spec.end()}, &format, &rows, &cols).ok()) << text;
    EXPECT_EQ(format.to_string(), text);
    EXPECT_EQ(rows, 12);
    EXPECT_EQ(cols, 345);
  }
}

TEST(Spec, RandomIntsNeverCrash) {
  std::mt19937_64 rng(2);
  const int64_t edges[] = {
      -1, 0, 1, 2, 3, 4, 11, 12, 16, 64, 65536, 65537, INT64_MAX, INT64_MIN, int64_t{1} << 32};
  int accepted = 0;
  for (int i = 0; i < 200000; ++i) {
    std::vector<int64_t> spec(rng() % 20 == 0 ? rng() % 12 : kSpecLength);
    for (size_t j = 0; j < spec.size(); ++j) {
      spec[j] = rng() % 3 == 0 ? edges[rng() % std::size(edges)]
                               : static_cast<int64_t>(rng() % (j == 2 ? 130 : 5));
    }
    Format format;
    int64_t rows = 0, cols = 0;
    const Status status = parse_spec(spec, &format, &rows, &cols);
    if (!status.ok()) {
      const bool worded = status.message.find("spec") != std::string::npos ||
                          status.message.find("shape") != std::string::npos;
      EXPECT_TRUE(worded) << status.message;
      continue;
    }
    ++accepted;
    EXPECT_EQ(format_of(format.to_string()), format);
    EXPECT_GE(rows, 1);
    EXPECT_GE(cols, 1);
  }
  EXPECT_GT(accepted, 50);
}

TEST(Format, IsPossibleExactlyWhenItsStringParsesBack) {
  int possible = 0;
  for (int code = 0; code < static_cast<int>(element_codes().size()); ++code) {
    for (Grouping grouping : {Grouping::kGroup, Grouping::kRow, Grouping::kTensor}) {
      for (int64_t group_size : {-16, 0, 8, 16, 17, 64, 65536, 65552}) {
        for (Zero zero : {Zero::kNone, Zero::kInt, Zero::kFloat, Zero::kMidrise}) {
          for (bool double_quant : {false, true}) {
            for (int outliers : {-1, 0, 1, 10, 100, 101}) {
              const Format format{code, grouping, group_size, zero, double_quant, outliers};
              Format parsed;
              const bool parses =
                  Format::parse(format.to_string(), &parsed).ok() && parsed == format;
              EXPECT_EQ(format.is_possible(), parses)
                  << format.to_string() << ", group size " << group_size;
              possible += parses;
            }
          }
        }
      }
    }
  }
  EXPECT_GT(possible, 100);
}

TEST(Spec, RefusesAnotherLength) {
  Format format;
  int64_t rows, cols;
  const Status status = parse_spec({0, 0, 64}, &format, &rows, &cols);
  EXPECT_NE(status.message.find("must hold 8 ints, got 3"), std::string::npos) << status.message;
}

}  // namespace
}  // namespace bitfold
