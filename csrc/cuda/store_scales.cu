#include "cuda/decode.h"
#include "cuda/device.cuh"
#include "cuda/quantize.h"

namespace bitfold::cuda {
namespace {

__device__ inline ScalePart nothing() { return {0.0, 0.0f, __int_as_float(0x7f800000)}; }

__device__ inline ScalePart meet(const ScalePart& a, const ScalePart& b) {
  return {a.sum + b.sum, greater(a.largest, b.largest), lesser(a.smallest, b.smallest)};
}

// The parts of all threads of a block, in every thread.
__device__ inline ScalePart meet_block(ScalePart part) {
  __shared__ ScalePart of_warp[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    part = meet(part, {__shfl_xor_sync(0xffffffffu, part.sum, step),
                       __shfl_xor_sync(0xffffffffu, part.largest, step),
                       __shfl_xor_sync(0xffffffffu, part.smallest, step)});
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = part;
  __syncthreads();
  part = of_warp[0];
  for (int i = 1; i < kThreads / 32; ++i) part = meet(part, of_warp[i]);
  __syncthreads();
  return part;
}

__device__ inline ScalePart whole(const ScalePart* parts, int64_t n) {
  static_assert(kParts <= kThreads);
  return meet_block(static_cast<int>(threadIdx.x) < parts_of(n) ? parts[threadIdx.x] : nothing());
}

__global__ void __launch_bounds__(kThreads)
    sum_parts(const float* __restrict__ scale, int64_t n, ScalePart* __restrict__ parts) {
  ScalePart part = nothing();
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads) {
    const float v = scale[i], magnitude = fabsf(v);
    part = meet(part, {static_cast<double>(v), magnitude,
                       magnitude > 0.0f ? magnitude : __int_as_float(0x7f800000)});
  }
  part = meet_block(part);
  if (threadIdx.x == 0) parts[blockIdx.x] = part;
}

__global__ void __launch_bounds__(kThreads)
    write_halves(const ScalePart* __restrict__ parts, int64_t n, float* __restrict__ scale,
                 uint16_t* __restrict__ halves, int8_t* exponent) {
  int e;
  if (parts) {
    const ScalePart all = whole(parts, n);
    e = exponent_of_range(all.largest, all.smallest);
    if (blockIdx.x == 0 && threadIdx.x == 0) *exponent = static_cast<int8_t>(e);
  } else {
    e = *exponent;
  }
  const float down = power_of_two(-e), up = power_of_two(e);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads) {
    const uint16_t half = to_half(scale[i] * down);
    halves[i] = half;
    scale[i] = from_half(half) * up;
  }
}

// One block. The sum of the CPU, which adds one scale after the other: by all threads where that is
// exact anyway, else by one, while the others fetch.
__global__ void __launch_bounds__(kThreads)
    find_offset(const ScalePart* __restrict__ parts, const float* __restrict__ scale, int64_t n,
                float* offset) {
  __shared__ float fetched[4 * kThreads];
  const ScalePart all = whole(parts, n);
  double sum = all.sum;
  if (!sums_exactly(all.largest, all.smallest, n)) {
    sum = 0.0;
    for (int64_t first = 0; first < n; first += 4 * kThreads) {
      const int count = static_cast<int>(n - first < 4 * kThreads ? n - first : 4 * kThreads);
      for (int i = threadIdx.x; i < count; i += kThreads) fetched[i] = scale[first + i];
      __syncthreads();
      if (threadIdx.x == 0)
        for (int i = 0; i < count; ++i) sum = sum + static_cast<double>(fetched[i]);
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) *offset = n > 0 ? static_cast<float>(sum / static_cast<double>(n)) : 0.0f;
}

static_assert(kDoubleQuantBlock == kThreads);

// A thread a scale, a block of threads a block of scales.
__global__ void __launch_bounds__(kThreads)
    double_quantize_blocks(const __grid_constant__ DynamicSteps steps, int64_t n, int bits,
                           const float* scale, float* stored_scale, float* __restrict__ zero,
                           uint8_t* __restrict__ codes, float* __restrict__ absmax,
                           const float* __restrict__ offset) {
  __shared__ uint16_t step[256];
  if (threadIdx.x < 255) step[threadIdx.x] = steps.step[threadIdx.x];
  __syncthreads();
  const float mean = *offset;
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t i = block * kThreads + threadIdx.x;
    const float wanted = i < n ? scale[i] : mean, off = wanted - mean;
    const float largest = meet_block({0.0, fabsf(off), 0.0f}).largest;
    if (threadIdx.x == 0) absmax[block] = largest;
    if (i >= n) continue;
    const unsigned code = code_of_point(step, point_of(off * inverse_of_block(largest)));
    codes[i] = static_cast<uint8_t>(code);
    if (!stored_scale) continue;
    const float stored = kDeviceDynamicMap[code] * largest + mean;
    stored_scale[i] = stored;
    if (zero) zero[i] = follow_scale(bits, zero[i], wanted, stored);
  }
}

__global__ void __launch_bounds__(kThreads)
    write_zero_halves(int64_t n, float* __restrict__ zero, uint16_t* __restrict__ halves) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads) {
    halves[i] = to_half(zero[i]);
    zero[i] = from_half(halves[i]);
  }
}

__global__ void __launch_bounds__(kThreads)
    write_exponent(const ScalePart* __restrict__ parts, int64_t n, float finest, int8_t* exponent) {
  const ScalePart all = whole(parts, n);
  if (threadIdx.x == 0)
    *exponent = static_cast<int8_t>(exponent_of_range(all.largest, all.smallest * finest));
}

__global__ void __launch_bounds__(kThreads)
    round_parameters(const StoredRounding rounding, const int8_t* exponent, int64_t n,
                     float* __restrict__ scale, float* __restrict__ zero) {
  const int e = exponent ? *exponent : 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads)
    rounding.apply(e, scale + i, zero + i);
}

// Integers are their own codes; eight of a row of groups a thread.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    write_zero_codes(const Spans spans, const float* __restrict__ zero,
                     uint8_t* __restrict__ packed) {
  const int64_t units = (spans.groups + 7) / 8, row_bytes = packed_row_bytes(spans.groups, kBits);
  const int64_t plane_bytes = kBits == 3 ? (spans.groups + 3) / 4 : 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < spans.rows * units;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / units, first = i % units * 8;
    const int count = static_cast<int>(spans.groups - first < 8 ? spans.groups - first : 8);
    unsigned code[8];
    for (int j = 0; j < 8; ++j)
      code[j] = j < count ? static_cast<unsigned>(zero[row * spans.groups + first + j]) : 0u;
    store_unit<kBits>(packed + row * row_bytes, plane_bytes, first, count, pack_unit<kBits>(code));
  }
}

}  // namespace

Status sum_scales(const float* scale, int64_t n, ScalePart* parts, cudaStream_t stream) {
  return run("sum_parts", sum_parts, blocks(static_cast<uint32_t>(parts_of(n))), 0, stream, scale,
             n, parts);
}

Status store_halves(const ScalePart* parts, int64_t n, float* scale, uint16_t* halves,
                    int8_t* exponent, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(n, &launch); !status.ok()) return status;
  return run("write_halves", write_halves, launch, 0, stream, parts, n, scale, halves, exponent);
}

Status store_double_quantized(const ScalePart* parts, int64_t n, int bits, const float* scale,
                              float* stored_scale, float* zero, uint8_t* codes, float* absmax,
                              float* offset, cudaStream_t stream) {
  static const DynamicSteps steps = make_dynamic_steps();
  if (Status status =
          run("find_offset", find_offset, blocks(1), 0, stream, parts, scale, n, offset);
      !status.ok())
    return status;
  Launch launch;
  if (Status status = plan_items(n, &launch); !status.ok() || launch.empty()) return status;
  return run("double_quantize_blocks", double_quantize_blocks, launch, 0, stream, steps, n, bits,
             scale, stored_scale, zero, codes, absmax, offset);
}

Status find_exponent(const ScalePart* parts, int64_t n, float finest, int8_t* exponent,
                     cudaStream_t stream) {
  return run("write_exponent", write_exponent, blocks(1), 0, stream, parts, n, finest, exponent);
}

Status round_as_stored(const StoredRounding& rounding, const int8_t* exponent, int64_t n,
                       float* scale, float* zero, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(n, &launch); !status.ok()) return status;
  return run("round_parameters", round_parameters, launch, 0, stream, rounding, exponent, n, scale,
             zero);
}

Status store_zeros(const Spans& spans, const DeviceEncoding& encoding, float* zero, void* stored,
                   cudaStream_t stream) {
  Launch launch;
  if (encoding.zero == Zero::kFloat) {
    if (Status status = plan_items(spans.count(), &launch); !status.ok()) return status;
    return run("write_zero_halves", write_zero_halves, launch, 0, stream, spans.count(), zero,
               static_cast<uint16_t*>(stored));
  }
  if (Status status = plan_items(spans.rows * ((spans.groups + 7) / 8), &launch); !status.ok())
    return status;
  const auto kernel = encoding.bits == 8   ? write_zero_codes<8>
                      : encoding.bits == 4 ? write_zero_codes<4>
                      : encoding.bits == 3 ? write_zero_codes<3>
                                           : write_zero_codes<2>;
  return run("write_zero_codes", kernel, launch, 0, stream, spans, zero,
             static_cast<uint8_t*>(stored));
}

}  // namespace bitfold::cuda
