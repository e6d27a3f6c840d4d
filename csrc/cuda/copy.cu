#include "cuda/copy.h"

#include <cstring>

#include "cuda/device.cuh"

namespace bitfold::cuda {

#if defined(__CUDACC__)

namespace {

Status done(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::success();
  return Status::error(StatusCode::kInvalidArgument,
                       std::string("CUDA refused ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace

Status copy_to_device(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  // From ordinary memory, which CUDA copies before it returns.
  return done(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream),
              "a copy to the GPU");
}

Status copy_to_host(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  if (Status status = done(
          cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream),
          "a copy from the GPU");
      !status.ok())
    return status;
  return wait_for(stream);
}

Status wait_for(cudaStream_t stream) {
  return done(cudaStreamSynchronize(stream), "to finish its work");
}

Status copy_on_device(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  return done(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
      "a copy on the GPU");
}

Status clear(void* to, int64_t bytes, cudaStream_t stream) {
  return done(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), stream), "to clear memory");
}

#else

Status copy_to_device(void* to, const void* from, int64_t bytes, cudaStream_t /*stream*/) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return Status::success();
}

Status copy_to_host(void* to, const void* from, int64_t bytes, cudaStream_t /*stream*/) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return Status::success();
}

Status wait_for(cudaStream_t /*stream*/) { return Status::success(); }

Status copy_on_device(void* to, const void* from, int64_t bytes, cudaStream_t /*stream*/) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return Status::success();
}

Status clear(void* to, int64_t bytes, cudaStream_t /*stream*/) {
  std::memset(to, 0, static_cast<size_t>(bytes));
  return Status::success();
}

#endif

}  // namespace bitfold::cuda
