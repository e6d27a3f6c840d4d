#include "torch/cuda/on_gpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "cuda/copy.h"
#include "torch/dense.h"

namespace bitfold::binding {
namespace {

template <class T>
LinearAlgebra::Gemm<T> gemm_on(const Device& device) {
  return [device](bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha,
                  const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
    const Tensor left =
        transpose_a ? borrow(a, device, m, k, 1, lda) : borrow(a, device, m, k, lda, 1);
    const Tensor right =
        transpose_b ? borrow(b, device, k, n, 1, ldb) : borrow(b, device, k, n, ldb, 1);
    const Tensor out = borrow(c, device, m, n, ldc, 1);
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, alpha));
  };
}

// Waits, since a solver goes on in one way or another.
template <class T>
LinearAlgebra::Cholesky<T> cholesky_on(const Device& device, cudaStream_t stream) {
  return [device, stream](int64_t n, T* a) {
    const torch::headeronly::IntHeaderOnlyArrayRef none;  // a scalar has no sizes
    const Tensor status = torch::stable::empty(none, ScalarType::Int, std::nullopt, device);
    factor_in_place(borrow(a, device, n, n, 1, n), status);
    int32_t info = 0;
    check(cuda::copy_to_host(&info, status.const_data_ptr(), sizeof info, stream), "cholesky");
    return info == 0;
  };
}

}  // namespace

OnGpu::OnGpu(const Place& place, const char* op)
    : context_(place, op),
      algebra_{gemm_on<float>(context_.device()), gemm_on<double>(context_.device()),
               cholesky_on<float>(context_.device(), context_.stream()),
               cholesky_on<double>(context_.device(), context_.stream()),
               [device = context_.device()](int64_t n, const float* l, int64_t m, float* b,
                                            int64_t ldb) {
                 solve_with_factor(l, device, n, m, b, ldb);
               }},
      gpu_{context_.stream(), algebra_, [this](int64_t bytes) {
             memory_.push_back(
                 torch::stable::empty({bytes}, ScalarType::Char, std::nullopt, context_.device()));
             return memory_.back().mutable_data_ptr();
           }} {}

}  // namespace bitfold::binding
