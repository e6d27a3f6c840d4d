// bitfold._C: what is not a tensor op. The Format table, build facts, instruction sets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/bitpack.h"
#include "core/format.h"
#include "core/layout.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace bitfold {
namespace {

py::object g_format_error;  // bitfold.errors.FormatError, handed over by bitfold.formats

[[noreturn]] void raise_format_error(const std::string& message) {
  PyErr_SetString(g_format_error ? g_format_error.ptr() : PyExc_ValueError, message.c_str());
  throw py::error_already_set();
}

Format parse_or_raise(const std::string& text) {
  Format format;
  const Status status = Format::parse(text, &format);
  if (!status.ok()) raise_format_error(status.message);
  return format;
}

using Shape = std::pair<int64_t, int64_t>;

void check_shape(const Format& f, const Shape& shape) {
  const Status status = bitfold::check_shape(f, shape.first, shape.second);
  if (!status.ok()) raise_format_error(status.message);
}

const char* grouping_name(const Format& f) {
  return f.grouping == Grouping::kGroup ? "group" : f.grouping == Grouping::kRow ? "row" : "tensor";
}

const char* zero_name(const Format& f) {
  switch (f.zero) {
    case Zero::kNone:
      return "none";
    case Zero::kInt:
      return "int";
    case Zero::kFloat:
      return "float";
    case Zero::kMidrise:
      return "midrise";
  }
  return "";
}

py::object levels_of(const Format& f) {
  if (f.family() != Family::kFixedCodebook) return py::none();
  const Codebook& book = *f.element().codebook;
  return py::cast(std::vector<float>(book.levels, book.levels + book.count));
}

py::list list_of(const BufferTable& buffers) {
  py::list result;
  for (const BufferSpec& spec : buffers) {
    const std::vector<int64_t> shape(spec.shape.begin(), spec.shape.end());
    result.append(py::make_tuple(spec.suffix, name_of(spec.dtype), py::tuple(py::cast(shape))));
  }
  return result;
}

py::list buffers_of(const Format& f, const Shape& shape) {
  check_shape(f, shape);
  return list_of(f.buffers(shape.first, shape.second));
}

py::list buffers_of_spec(const std::vector<int64_t>& spec) {
  Format format;
  int64_t rows = 0, cols = 0;
  const Status status = parse_spec(spec, &format, &rows, &cols);
  if (!status.ok()) raise_format_error(status.message);
  return list_of(format.buffers(rows, cols));
}

py::list codes() {
  py::list result;
  for (const ElementCode& e : element_codes())
    result.append(py::make_tuple(e.name, e.bits, e.remark));
  return result;
}

py::list instruction_set_list() {
  py::list result;
  for (const InstructionSet& isa : instruction_sets()) {
    result.append(py::make_tuple(isa.name, isa.description, isa.supported()));
  }
  return result;
}

py::bytes pack_bits(const py::bytes& codes, int64_t cols, int bits) {
  const std::string_view source = codes;
  if (cols < 1 || source.size() % static_cast<size_t>(cols) != 0 ||
      packed_row_bytes(1, bits) == 0) {
    throw py::value_error(
        "pack_bits(): codes must be whole rows of cols >= 1 bytes, and bits 2, 3, 4 or 8");
  }
  const int64_t rows = static_cast<int64_t>(source.size()) / cols,
                row_bytes = packed_row_bytes(cols, bits);
  std::string out(static_cast<size_t>(rows * row_bytes), '\0');
  for (int64_t r = 0; r < rows; ++r) {
    pack_row(reinterpret_cast<const uint8_t*>(source.data()) + r * cols, cols, bits,
             reinterpret_cast<uint8_t*>(out.data()) + r * row_bytes);
  }
  return py::bytes(out);
}

py::bytes unpack_bits(const py::bytes& packed, int64_t cols, int bits) {
  const std::string_view source = packed;
  const int64_t row_bytes = cols >= 1 ? packed_row_bytes(cols, bits) : 0;
  if (row_bytes == 0 || source.size() % static_cast<size_t>(row_bytes) != 0) {
    throw py::value_error(
        "unpack_bits(): packed must be whole rows for cols >= 1 and bits 2, 3, 4 or 8");
  }
  const int64_t rows = static_cast<int64_t>(source.size()) / row_bytes;
  std::string out(static_cast<size_t>(rows * cols), '\0');
  for (int64_t r = 0; r < rows; ++r) {
    unpack_row(reinterpret_cast<const uint8_t*>(source.data()) + r * row_bytes, cols, bits,
               reinterpret_cast<uint8_t*>(out.data()) + r * cols);
  }
  return py::bytes(out);
}

constexpr const char* kFormatDoc = R"(How one matrix is stored, known by a short string.

The string is an element code, then options joined by '-': ``nf4``, ``nf4-nodq``, ``int8-row``, ``int4-g64-sym``.
Codes: nf4 nf3 nf2 fp4 log4 (fixed levels times a scale per group of 64, scales double quantized),
int8 int4 int3 int2 (integer grids), kmeans4 kmeans3 kmeans2 (levels learned per row or tensor).
Options: gN (group of N, a multiple of 16), row, tensor; sym, zp, fz, midrise (zero point: none, integer, fp16, half-way);
dq, nodq (double quantization of the scales); outliersN (N per mille of the weights, 10 if left out, are kept in
fp16 beside the codes). docs/format.md specifies the bytes.

Args:
    text: the format string.

Raises:
    FormatError: unknown code or option, or an impossible combination; names the token and what is allowed.

Example:
    >>> from bitfold import Format
    >>> f = Format("int4-g64")
    >>> str(f), f.bits, f.zero
    ('int4-g64', 4, 'int')
    >>> round(Format("nf4").bits_per_weight((4096, 4096)), 3)
    4.127
)";

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native facts of bitfold: formats, instruction sets, bit packing without torch.";

  py::class_<Format>(m, "Format", kFormatDoc)
      .def(py::init(&parse_or_raise), py::arg("text"))
      .def(py::init([](const Format& other) { return other; }), py::arg("format"))
      .def_static("parse", &parse_or_raise, py::arg("text"),
                  "The format that `text` names; same as Format(text).")
      .def("__str__", &Format::to_string)
      .def("__repr__", [](const Format& f) { return "Format('" + f.to_string() + "')"; })
      .def(
          "__eq__", [](const Format& a, const Format& b) { return a == b; }, py::is_operator())
      .def("__hash__", [](const Format& f) { return py::hash(py::str(f.to_string())); })
      .def(py::pickle(
          [](const Format& f) { return py::make_tuple(f.to_string()); },
          [](const py::tuple& state) { return parse_or_raise(state[0].cast<std::string>()); }))
      .def_property_readonly(
          "code", [](const Format& f) { return f.element().name; }, "Element code, such as 'nf4'.")
      .def_property_readonly("bits", &Format::bits, "Bits of one code: 2, 3, 4 or 8.")
      .def_property_readonly("grouping", &grouping_name,
                             "What shares a scale: 'group', 'row' or 'tensor'.")
      .def_property_readonly(
          "group_size",
          [](const Format& f) -> std::optional<int64_t> {
            return f.grouping == Grouping::kGroup ? std::optional(f.group_size) : std::nullopt;
          },
          "Weights per group along a row, or None.")
      .def_property_readonly("zero", &zero_name, "Zero point: 'none', 'int', 'float' or 'midrise'.")
      .def_readonly("double_quant", &Format::double_quant,
                    "Whether scales are stored as 8-bit codes.")
      .def_readonly("outliers", &Format::outliers,
                    "Weights per mille that also have a sparse fp16 value; 0: none.")
      .def_property_readonly("dense", &Format::dense,
                             "The same without outliers; its buffers are the first ones.")
      .def(
          "outlier_count",
          [](const Format& f, const Shape& shape) {
            check_shape(f, shape);
            return f.outlier_count(shape.first, shape.second);
          },
          py::arg("shape"), "How many weights of (out, in) have a sparse value.")
      .def_property_readonly(
          "default_method",
          [](const Format& f) { return f.element().method == Method::kRound ? "round" : "search"; },
          "How scales are chosen unless asked otherwise.")
      .def_property_readonly("levels", &levels_of, "The fixed levels by code, or None.")
      .def("buffers", &buffers_of, py::arg("shape"),
           "[(suffix, dtype name, shape), …] of the stored tensors for a weight (out, in), in the "
           "order ops take them.")
      .def(
          "nbytes",
          [](const Format& f, const Shape& shape) {
            check_shape(f, shape);
            return f.nbytes(shape.first, shape.second);
          },
          py::arg("shape"), "Bytes stored for a weight (out, in), metadata included.")
      .def(
          "bits_per_weight",
          [](const Format& f, const Shape& shape) {
            check_shape(f, shape);
            const double weights =
                static_cast<double>(shape.first) * static_cast<double>(shape.second);
            return 8.0 * static_cast<double>(f.nbytes(shape.first, shape.second)) / weights;
          },
          py::arg("shape"), "8 x nbytes / (out x in).")
      .def(
          "spec",
          [](const Format& f, const Shape& shape) {
            check_shape(f, shape);
            return py::list(py::cast(make_spec(f, shape.first, shape.second)));
          },
          py::arg("shape"), "The ints that torch.ops.bitfold.* take for a weight (out, in).")
      .def(
          "suits_panels",
          [](const Format& f, const Shape& shape) {
            check_shape(f, shape);
            return suits_panels(f, shape.first, shape.second);
          },
          py::arg("shape"), "Whether the codes of a weight (out, in) can lie in panels.");

  m.def("buffers_of_spec", &buffers_of_spec, py::arg("spec"),
        "Format.buffers for the ints of Format.spec.");
  m.def("codes", &codes, "[(name, bits, remark), …] of all element codes.");
  m.def("instruction_sets", &instruction_set_list,
        "[(name, description, supported here), …], best first.");
  m.def("pack_bits", &pack_bits, py::arg("codes"), py::arg("cols"), py::arg("bits"),
        "Rows of codes (one per byte) to packed rows; for tools without torch.");
  m.def("unpack_bits", &unpack_bits, py::arg("packed"), py::arg("cols"), py::arg("bits"),
        "Packed rows to one code per byte.");
  m.def(
      "set_format_error", [](py::object error) { g_format_error = std::move(error); },
      py::arg("error"), "Names the exception class that a bad format string raises.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = BITFOLD_VERSION;
        info["compiler"] = __VERSION__;
        info["cplusplus"] = static_cast<int64_t>(__cplusplus);
        info["cuda"] = BITFOLD_CUDA_BUILT;  // architectures of _ops_cuda; empty: not built
        return info;
      },
      "How this library was built.");
}

}  // namespace bitfold
