#include "torch/checks.h"

#include <algorithm>
#include <new>
#include <stdexcept>

namespace bitfold::binding {

void fail(const char* op, const std::string& message) {
  throw std::runtime_error(std::string("bitfold::") + op + ": " + message);
}

void check(const Status& status, const char* op) {
  if (!status.ok()) fail(op, status.message);
}

namespace {

// Words by which others know a want of memory: accelerate then tries a smaller batch.
#ifdef USE_CUDA
constexpr const char* kOutOfMemory = "CUDA out of memory.";
#else
constexpr const char* kOutOfMemory = "DefaultCPUAllocator: can't allocate memory.";
#endif

}  // namespace

// There since torch 2.13. Before, torch prints what was the matter, and tells nobody.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// What torch's C interface returns is a number, and what its headers make of that has the name of
// the call; the one that allocates is some kind of empty.
void throw_as(const char* op, const std::exception& error) {
  const std::string what = error.what();
  if (what.starts_with("bitfold::")) throw;
  if (dynamic_cast<const std::bad_alloc*>(&error)) fail(op, kOutOfMemory);
  const size_t call = what.find(" API call failed at ");
  if (call == std::string::npos) fail(op, what);
  if (torch_exception_get_what_without_backtrace)
    fail(op, torch_exception_get_what_without_backtrace());
  if (what.rfind("empty", call) != std::string::npos)
    fail(op, std::string(kOutOfMemory) + " Torch has printed how much was asked for");
  fail(op, "torch refused " + what.substr(0, call) + "; it has printed why");
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty_with_last(const Tensor& like, int64_t last) {
  const int64_t dim = like.dim();
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end()), strides(sizes.size());
  sizes.back() = last;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i]))
    strides[i] = stride;
  int32_t dtype, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes.data(), strides.data(), dtype, device, index, &made));
  return Tensor(made);
}

bool is_on(const Tensor& tensor, const Place& place) {
  return place.on_gpu ? tensor.is_cuda() && tensor.get_device_index() == place.gpu
                      : tensor.is_cpu();
}

std::string name_of(const Place& place) {
  if (!place.on_gpu) return "CPU";
  return place.gpu < 0 ? "CUDA" : "cuda:" + std::to_string(place.gpu);
}

void look_for_gpu(const Tensor& tensor, Place* found) {
  if (found->gpu < 0 && tensor.is_cuda()) found->gpu = tensor.get_device_index();
}
void look_for_gpu(const std::optional<Tensor>& tensor, Place* found) {
  if (tensor.has_value()) look_for_gpu(*tensor, found);
}
void look_for_gpu(const std::vector<Tensor>& tensors, Place* found) {
  for (const Tensor& tensor : tensors) look_for_gpu(tensor, found);
}

namespace {

std::string device_of(const Place& place) { return place.on_gpu ? name_of(place) : "the CPU"; }
std::string device_of(const Tensor& tensor) {
  if (tensor.is_cuda()) return device_of(gpu_of(tensor));
  return tensor.is_cpu() ? device_of(kCpu) : "another device";
}

}  // namespace

void check_beside(const Tensor& tensor, const Place& place, const char* op, const char* argument,
                  const char* whose) {
  if (is_on(tensor, place)) return;
  fail(op, std::string(argument) + " must be on the same device as " + whose + " (" +
               device_of(place) + "), got " + device_of(tensor));
}

std::string what_came(const Tensor& tensor) {
  return std::string(tensor.is_contiguous() ? "" : "non-contiguous ") +
         name_of(tensor.scalar_type()) + " " + shape_of(tensor) + " on " + device_of(tensor);
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

FloatType float_type(ScalarType dtype, const char* op, const char* argument) {
  switch (dtype) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::Half:
      return FloatType::kFloat16;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    default:
      fail(op,
           std::string(argument) + " must be float32, float16 or bfloat16, got " + name_of(dtype));
  }
}

ScalarType scalar_type(FloatType dtype) {
  return dtype == FloatType::kFloat32   ? ScalarType::Float
         : dtype == FloatType::kFloat16 ? ScalarType::Half
                                        : ScalarType::BFloat16;
}

ScalarType scalar_type(DType dtype) {
  return dtype == DType::kInt8    ? ScalarType::Char
         : dtype == DType::kInt16 ? ScalarType::Short
                                  : ScalarType::Int;
}

Folding folding_of(const Tensor& weight, const std::vector<int64_t>& spec, const char* op,
                   const Place& place) {
  Folding folding;
  int64_t rows = 0, cols = 0;
  check(parse_spec(spec, &folding.format, &rows, &cols), op);
  if (weight.dim() != 2 || weight.size(0) != rows || weight.size(1) != cols ||
      !is_on(weight, place)) {
    fail(op, "weight must be a " + name_of(place) + " tensor [out, in] = [" + std::to_string(rows) +
                 ", " + std::to_string(cols) + "], got " + what_came(weight));
  }
  folding.weight = {weight.const_data_ptr(),
                    float_type(weight.scalar_type(), op, "weight"),
                    rows,
                    cols,
                    weight.stride(0),
                    weight.stride(1)};
  return folding;
}

Method method_of(int64_t method, const char* op) {
  if (method != 0 && method != 1)
    fail(op, "method must be 0 (round) or 1 (search), got " + std::to_string(method));
  return static_cast<Method>(method);
}

Tensor cpu_tensor(const double* values, size_t count) {
  Tensor tensor =
      torch::stable::empty({static_cast<int64_t>(count)}, ScalarType::Double, std::nullopt,
                           torch::stable::Device(torch::headeronly::DeviceType::CPU));
  std::copy_n(values, count, static_cast<double*>(tensor.mutable_data_ptr()));
  return tensor;
}

std::vector<Tensor> empty_buffers(const Tensor& like, const Folding& folding,
                                  std::vector<void*>* data, size_t first) {
  std::vector<Tensor> packed;
  const BufferTable buffers = folding.format.buffers(folding.weight.rows, folding.weight.cols);
  for (size_t i = first; i < buffers.size(); ++i) {
    packed.push_back(torch::stable::new_empty(
        like, {buffers[i].shape.data(), buffers[i].shape.size()}, scalar_type(buffers[i].dtype)));
    data->push_back(packed.back().mutable_data_ptr());
  }
  return packed;
}

namespace {

// The sentence is put together only once something is wrong.
[[noreturn]] void fail_buffer(const PackedBuffers& weight, const BufferSpec& want,
                              const Tensor& got, const Place& place, const char* op) {
  fail(op, "weight" + std::string(want.suffix) + "(" + weight.format.to_string() +
               ") must be a contiguous " + name_of(scalar_type(want.dtype)) + " " + name_of(place) +
               " tensor of " + std::to_string(want.numel()) + " elements for [out, in] = [" +
               std::to_string(weight.rows) + ", " + std::to_string(weight.cols) + "], got " +
               what_came(got));
}

bool lies_in_panels(const PackedBuffers& weight, const BufferSpec& codes, const Tensor& got) {
  return got.dim() == 3 && got.size(0) == weight.rows / kPanelHeight && got.size(2) == kPanelStep &&
         got.numel() == codes.numel() && suits_panels(weight.format, weight.rows, weight.cols);
}

}  // namespace

PackedBuffers unpack_buffers(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
                             const char* op, const Place& place, Layouts layouts) {
  PackedBuffers result;
  check(parse_spec(spec, &result.format, &result.rows, &result.cols), op);
  const BufferTable buffers = result.format.buffers(result.rows, result.cols);
  if (packed.size() != buffers.size()) {
    fail(op, "packed(" + result.format.to_string() + ") must hold " +
                 std::to_string(buffers.size()) + " tensors, got " + std::to_string(packed.size()));
  }
  for (size_t i = 0; i < buffers.size(); ++i) {
    const BufferSpec& want = buffers[i];
    const Tensor& got = packed[i];
    if (got.scalar_type() != scalar_type(want.dtype) || got.numel() != want.numel() ||
        !is_on(got, place) || !got.is_contiguous()) {
      fail_buffer(result, want, got, place, op);
    }
    if (i == 0 && lies_in_panels(result, want, got)) result.layout = Layout::kPanels;
    result.data.push_back(got.const_data_ptr());
  }
  if (result.layout == Layout::kPanels && layouts == Layouts::kRows) {
    fail(op, "weight must lie in rows here, got panels " + shape_of(packed[0]) +
                 "; take packed() of the module, or set its layout to \"rows\"");
  }
  return result;
}

Packed unpack(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec, const char* op,
              Layouts layouts) {
  Packed result{unpack_buffers(packed, spec, op, kCpu, layouts), {}};
  result.view = make_view(result.format, result.rows, result.cols, result.data.data());
  result.view.layout = result.layout;
  return result;
}

}  // namespace bitfold::binding
