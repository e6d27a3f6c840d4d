#include "cuda/decode.h"
#include "cuda/device.cuh"
#include "cuda/encode.h"
#include "cuda/kernels.h"

namespace bitfold::cuda {
namespace {

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    pack_units(const uint8_t* __restrict__ codes, int64_t rows, int64_t cols,
               uint8_t* __restrict__ packed) {
  const int64_t units = (cols + 7) / 8, row_bytes = packed_row_bytes(cols, kBits);
  const int64_t plane_bytes = kBits == 3 ? (cols + 3) / 4 : 0;
  constexpr unsigned kMask = (1u << kBits) - 1;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows * units;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / units, col = i % units * 8;
    const int n = static_cast<int>(cols - col < 8 ? cols - col : 8);
    unsigned code[8];
    for (int j = 0; j < 8; ++j) code[j] = j < n ? codes[row * cols + col + j] & kMask : 0u;
    store_unit<kBits>(packed + row * row_bytes, plane_bytes, col, n, pack_unit<kBits>(code));
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_codes(const uint8_t* __restrict__ packed, int bits, int64_t rows, int64_t cols,
                 uint8_t* __restrict__ codes) {
  const int64_t row_bytes = packed_row_bytes(cols, bits);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows * cols;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / cols;
    codes[i] =
        static_cast<uint8_t>(extract_code(packed + row * row_bytes, cols, bits, i - row * cols));
  }
}

__global__ void __launch_bounds__(kThreads)
    double_dequantize_scales(const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
                             const float* __restrict__ offset, int64_t n,
                             float* __restrict__ scales) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads)
    scales[i] = kDeviceDynamicMap[codes[i]] * absmax[i / kDoubleQuantBlock] + *offset;
}

}  // namespace

Status pack_bits(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t* packed,
                 cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(rows * ((cols + 7) / 8), &launch); !status.ok() || launch.empty())
    return status;
  const auto kernel = bits == 8   ? pack_units<8>
                      : bits == 4 ? pack_units<4>
                      : bits == 3 ? pack_units<3>
                                  : pack_units<2>;
  return run("pack_units", kernel, launch, 0, stream, codes, rows, cols, packed);
}

Status unpack_bits(const uint8_t* packed, int64_t rows, int64_t cols, int bits, uint8_t* codes,
                   cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(rows * cols, &launch); !status.ok() || launch.empty())
    return status;
  return run("unpack_codes", unpack_codes, launch, 0, stream, packed, bits, rows, cols, codes);
}

Status double_dequantize(const uint8_t* codes, const float* absmax, const float* offset, int64_t n,
                         float* scales, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(n, &launch); !status.ok() || launch.empty()) return status;
  return run("double_dequantize_scales", double_dequantize_scales, launch, 0, stream, codes, absmax,
             offset, n, scales);
}

}  // namespace bitfold::cuda
