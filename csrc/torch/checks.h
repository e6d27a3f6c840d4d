// From tensors to views, with the argument checks that word the messages. The only folder that sees
// torch; no arithmetic here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "core/format.h"
#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"

namespace bitfold::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError("bitfold::<op>: <message>"). A plain throw: STD_TORCH_CHECK would put file
// and line before the sentence.
[[noreturn]] void fail(const char* op, const std::string& message);
void check(const Status& status, const char* op);
// Called while `error` is handled: throws it again in the name of `op`, if it does not bear one.
[[noreturn]] void throw_as(const char* op, const std::exception& error);

// `tensor` itself where it lies contiguously, else a copy. The stable ABI looks an op up by its
// name at every call, so that asking first is cheaper.
Tensor as_contiguous(const Tensor& tensor);

// A fresh contiguous tensor of like's sizes but for the last, of its dtype, on its device; `like`
// has at least one dimension. A third of the instructions of new_empty, which is looked up by name.
Tensor empty_with_last(const Tensor& like, int64_t last);

// Where the tensors of a call must lie: on the CPU, or all on one GPU.
struct Place {
  bool on_gpu = false;
  int32_t gpu = -1;  // its number; -1 is none, on which nothing lies
};
inline constexpr Place kCpu{};

bool is_on(const Tensor& tensor, const Place& place);
std::string name_of(const Place& place);  // "CPU", "cuda:0"; "CUDA" for none

void look_for_gpu(const Tensor& tensor, Place* found);
void look_for_gpu(const std::optional<Tensor>& tensor, Place* found);
void look_for_gpu(const std::vector<Tensor>& tensors, Place* found);
// The GPU of the first of these that lies on one: torch takes an op's CUDA kernel as soon as any
// argument does.
template <class... Arguments>
Place gpu_of(const Arguments&... arguments) {
  Place found{.on_gpu = true};
  (look_for_gpu(arguments, &found), ...);
  return found;
}

// Fails unless `tensor` lies where `whose` does, on `place`.
void check_beside(const Tensor& tensor, const Place& place, const char* op, const char* argument,
                  const char* whose);

// What a message says was found: contiguous or not, dtype, shape, device.
std::string what_came(const Tensor& tensor);
std::string shape_of(const Tensor& tensor);
const char* name_of(ScalarType dtype);

// The kernels of the active instruction set; fails where BITFOLD_ISA cannot be honoured. (This and
// the next are in cpu_kernels.cc, which _ops_cuda does without.)
const KernelTable& kernels(const char* op);

// Torch's thread pool.
const Parallel& torch_parallel();

FloatType float_type(ScalarType dtype, const char* op, const char* argument);
ScalarType scalar_type(FloatType dtype);
ScalarType scalar_type(DType dtype);

// A weight [rows, cols] of floats and what it is to be folded into.
struct Folding {
  Format format;
  MatrixView weight;
};
// Fails where the weight has not the spec's shape, or another dtype or place.
Folding folding_of(const Tensor& weight, const std::vector<int64_t>& spec, const char* op,
                   const Place& place = kCpu);
Method method_of(int64_t method, const char* op);

// float64 [count] on the CPU: what a report says.
Tensor cpu_tensor(const double* values, size_t count);

// Fresh tensors for the buffers of what a weight is folded into, from number `first` on, on the
// device of `like`; where their data lies is added to `data`.
std::vector<Tensor> empty_buffers(const Tensor& like, const Folding& folding,
                                  std::vector<void*>* data, size_t first = 0);

struct PackedBuffers {
  Format format;
  int64_t rows = 0, cols = 0;
  Layout layout = Layout::kRows;
  ShortList<const void*, kMaxBuffers> data;
};
struct Packed : PackedBuffers {
  PackedView view;
};

// Checks number, dtype, device, size and contiguity of every buffer against the spec. They must
// lie on `place`, and the codes in one of these layouts. Panels, int8 [rows / 16, bytes of a row /
// 4, 64], are told by their shape.
enum class Layouts : uint8_t { kRows, kRowsOrPanels };
PackedBuffers unpack_buffers(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec,
                             const char* op, const Place& place = kCpu,
                             Layouts layouts = Layouts::kRows);
// The same on the CPU, and looks at the bytes.
Packed unpack(const std::vector<Tensor>& packed, const std::vector<int64_t>& spec, const char* op,
              Layouts layouts);

}  // namespace bitfold::binding
