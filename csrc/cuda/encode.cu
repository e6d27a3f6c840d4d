#include "cuda/book.cuh"
#include "cuda/quantize.h"
#include "cuda/source.cuh"

namespace bitfold::cuda {
namespace {

// Where codes go, and how they lie there.
struct CodeRows {
  uint8_t* codes;
  int64_t row_bytes, plane_bytes;
  bool whole;  // every unit is complete, and its bytes may be stored at once

  CodeRows(uint8_t* to, int64_t cols, int bits)
      : codes(to),
        row_bytes(packed_row_bytes(cols, bits)),
        plane_bytes(bits == 3 ? (cols + 3) / 4 : 0),
        whole(bits != 3 && cols % 8 == 0 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {}
};

template <int kBits>
__device__ inline void put_unit(const CodeRows& to, int64_t row, int64_t col, int n,
                                const unsigned* code) {
  const PackedUnit unit = pack_unit<kBits>(code);
  uint8_t* at = to.codes + row * to.row_bytes;
  if constexpr (kBits != 3) {
    if (to.whole) {
      at += col * kBits / 8;
      if constexpr (kBits == 8) *reinterpret_cast<uint2*>(at) = make_uint2(unit.low, unit.high);
      if constexpr (kBits == 4) *reinterpret_cast<uint32_t*>(at) = unit.low;
      if constexpr (kBits == 2) *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(unit.low);
      return;
    }
  }
  store_unit<kBits>(at, to.plane_bytes, col, n, unit);
}

// Eight weights a thread, for scales and zero points that are known.
template <int kBits, bool kBook>
__global__ void __launch_bounds__(kThreads, kThreeBlocks)
    encode_units(const MatrixView w, const Spans spans,
                 const __grid_constant__ DeviceEncoding encoding, const RowPlan plan,
                 const float* __restrict__ scale, const float* __restrict__ zero,
                 const CodeRows to) {
  __shared__ Bin bins[kBins];
  if (kBook) fetch_bins(encoding, bins);
  const int64_t unit = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, col = unit * 8;
  if (unit >= plan.units) return;
  constexpr float kTop = static_cast<float>((1 << kBits) - 1);
  const int n = static_cast<int>(w.cols - col < 8 ? w.cols - col : 8);
  const int64_t group = col / spans.group_size, stride = spans.rows == 1 ? 0 : spans.groups;
  const int64_t block_rows = rows_per_block(blockDim.y);
  for (int64_t block = blockIdx.y; block < plan.row_blocks; block += gridDim.y) {
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int64_t row = block * block_rows + i * blockDim.y + threadIdx.y;
      if (row >= plan.rows) break;
      const float inverse = inverse_scale(scale[row * stride + group]);
      const float origin = kBook ? 0.0f : zero[row * stride + group];
      unsigned code[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float v = j < n ? load_weight(w, row, col + j) : 0.0f;
        if constexpr (kBook) {
          const float scaled = v * inverse;
          code[j] = code_in(bins[bin_of(scaled)], scaled);
        } else {
          code[j] = static_cast<unsigned>(grid_code(v, inverse, origin, kTop));
        }
        if (j >= n) code[j] = 0;
      }
      put_unit<kBits>(to, row, col, n, code);
    }
  }
}

// Largest magnitude, as bits: those of NaN and infinity are above all others.
template <FloatType kType>
__device__ inline uint32_t largest_bits(const Eight<kType>& eight) {
  float v[8];
  eight.to_floats(v);
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) largest = max(largest, __float_as_uint(v[j]) & 0x7fffffffu);
  return largest;
}

// Fixed levels with the absmax as scale, in one reading: neighbouring lanes hold a group in their
// registers, eight weights each, and are kRowsPerThread rows ahead with their loads.
template <int kBits, FloatType kType>
__global__ void __launch_bounds__(kThreads, kBlocksFor<kType>)
    fold_units(const MatrixView w, const Spans spans,
               const __grid_constant__ DeviceEncoding encoding, const RowPlan plan,
               float* __restrict__ scale, const CodeRows to) {
  // Half a warp reads at a time: a lane meets no other in a bank, whatever bins they read.
  __shared__ Bin bins[kBins * kBinLanes];
  fetch_bins<kBinLanes>(encoding, bins);
  const auto* table = reinterpret_cast<const uint8_t*>(bins);
  const uint32_t lane_offset =
      static_cast<uint32_t>(thread_of_block()) % kBinLanes * static_cast<uint32_t>(sizeof(Bin));
  const int64_t unit = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, col = unit * 8;
  const bool inside = unit < plan.units;
  // A short row is one group in fewer lanes.
  const int lanes = min(static_cast<int>(spans.group_size / 8), static_cast<int>(blockDim.x));
  const int64_t group = col / spans.group_size, block_rows = rows_per_block(blockDim.y);
  for (int64_t block = blockIdx.y; block < plan.row_blocks; block += gridDim.y) {
    const int64_t first = block * block_rows + threadIdx.y;
    Eight<kType> eight[kRowsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int64_t row = first + i * blockDim.y;
      if (inside && row < plan.rows) {
        eight[i].load(w, row, col);
      } else {
        eight[i].clear();
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      uint32_t bits = largest_bits(eight[i]);
      for (int step = 1; step < lanes; step *= 2)
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
      const int64_t row = first + i * blockDim.y;
      if (!inside || row >= plan.rows) continue;
      const float absmax = __uint_as_float(bits);
      const float inverse = inverse_scale(absmax);
      if (col == group * spans.group_size)
        scale[row * spans.groups + group] =
            bits < 0x7f800000u ? absmax : __uint_as_float(0x7fc00000u);
      float v[8];
      eight[i].to_floats(v);
      unsigned code[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float scaled = v[j] * inverse;
        code[j] = code_in(*reinterpret_cast<const Bin*>(table + (bin_place(scaled) | lane_offset)),
                          scaled);
      }
      put_unit<kBits>(to, row, col, 8, code);
    }
  }
}

template <int kBits>
Status encode_bits(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                   const float* scale, const float* zero, uint8_t* codes, cudaStream_t stream) {
  RowPlan plan;
  if (Status status = plan_rows(w.rows, (w.cols + 7) / 8, &plan); !status.ok()) return status;
  const CodeRows to(codes, w.cols, kBits);
  auto kernel = encode_units<kBits, false>;
  if constexpr (kBits <= 4) {
    if (encoding.book) kernel = encode_units<kBits, true>;
  }
  return run("encode_units", kernel, plan.launch, 0, stream, w, spans, encoding, plan, scale, zero,
             to);
}

template <int kBits>
Status fold_bits(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                 float* scale, uint8_t* codes, cudaStream_t stream) {
  RowPlan plan;
  if (Status status = plan_rows(w.rows, w.cols / 8, &plan); !status.ok()) return status;
  const CodeRows to(codes, w.cols, kBits);
  const auto kernel = w.dtype == FloatType::kFloat32   ? fold_units<kBits, FloatType::kFloat32>
                      : w.dtype == FloatType::kFloat16 ? fold_units<kBits, FloatType::kFloat16>
                                                       : fold_units<kBits, FloatType::kBFloat16>;
  return run("fold_units", kernel, plan.launch, 0, stream, w, spans, encoding, plan, scale, to);
}

}  // namespace

Status encode_rows(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                   const float* scale, const float* zero, uint8_t* codes, cudaStream_t stream) {
  const auto encode = encoding.bits == 8   ? encode_bits<8>
                      : encoding.bits == 4 ? encode_bits<4>
                      : encoding.bits == 3 ? encode_bits<3>
                                           : encode_bits<2>;
  return encode(w, spans, encoding, scale, zero, codes, stream);
}

bool can_fold(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding) {
  const int64_t size = spans.group_size;
  return encoding.book && spans.rows == w.rows && is_aligned(w) &&
         (size == 16 || size == 32 || size == 64 || size == 128 || size == 256);
}

Status fold_rows(const MatrixView& w, const Spans& spans, const DeviceEncoding& encoding,
                 float* scale, uint8_t* codes, cudaStream_t stream) {
  const auto fold = encoding.bits == 4   ? fold_bits<4>
                    : encoding.bits == 3 ? fold_bits<3>
                                         : fold_bits<2>;
  return fold(w, spans, encoding, scale, codes, stream);
}

}  // namespace bitfold::cuda
