#include "cuda/decode.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"

#if defined(__CUDACC__)
// What assert() calls; declared by CUDA's headers only without NDEBUG.
extern "C" __host__ __device__ void __assert_fail(const char*, const char*, unsigned,
                                                  const char*) noexcept;
#endif

namespace bitfold::cuda {
namespace {

// Which part of the weight the result is: rows in order or by an index, and a run of columns.
struct RowIndices {
  const void* index;  // null: every row in order, from first_row on
  bool wide;
  int64_t first_row, first_col, cols;
};

__device__ inline int64_t source_row(const RowIndices& rows, int64_t i) {
  if (!rows.index) return rows.first_row + i;
  return rows.wide ? static_cast<const int64_t*>(rows.index)[i]
                   : static_cast<const int32_t*>(rows.index)[i];
}

// Before all else, and apart: a kernel that calls needs a stack.
__global__ void __launch_bounds__(kThreads)
    check_indices(const RowIndices indices, int64_t count, int64_t rows) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = source_row(indices, i);
    if (row >= 0 && row < rows) continue;
    // CUDA prints the sentence, and ends the context.
    __assert_fail("bitfold::embedding: index out of range of the rows of the table",
                  "csrc/cuda/dequantize.cu", __LINE__, "embedding");
  }
}

// Sixteen bytes of the result.
template <FloatType kType>
constexpr int kUnit = kType == FloatType::kFloat32 ? 4 : 8;

template <FloatType kType>
__device__ inline uint4 rounded(const float* v) {
  if constexpr (kType == FloatType::kFloat32) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3]));
  } else if constexpr (kType == FloatType::kFloat16) {
    return make_uint4(to_half_pair(v[0], v[1]), to_half_pair(v[2], v[3]), to_half_pair(v[4], v[5]),
                      to_half_pair(v[6], v[7]));
  } else {
    return make_uint4(to_bfloat16_pair(v[0], v[1]), to_bfloat16_pair(v[2], v[3]),
                      to_bfloat16_pair(v[4], v[5]), to_bfloat16_pair(v[6], v[7]));
  }
}

__device__ inline void store_one(void* out, FloatType dtype, int64_t at, float v) {
  if (dtype == FloatType::kFloat32) static_cast<float*>(out)[at] = v;
  if (dtype == FloatType::kFloat16) static_cast<uint16_t*>(out)[at] = to_half(v);
  if (dtype == FloatType::kBFloat16)
    static_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(to_bfloat16_pair(v, 0.0f));
}

// Levels in shared memory: sixteen words in sixteen banks, so that no two lanes wait for each
// other. Learned codebooks: one such row for each row of the block.
template <int kBits, bool kTable>
__device__ inline const float* table_of(const float (*tables)[16], const DeviceWeight& w, int row) {
  if constexpr (!kTable) return nullptr;
  return tables[w.view.family == Family::kLearnedCodebook ? row : 0];
}

template <int kBits, FloatType kType, bool kTable>
__global__ void __launch_bounds__(kThreads, kBlocksFor<kType>)
    dequantize_rows(const __grid_constant__ DeviceWeight w, const RowIndices indices,
                    const RowPlan plan, void* __restrict__ out) {
  constexpr int N = kUnit<kType>;
  auto* tables = dynamic_shared<float[16]>();
  const PackedView& view = w.view;
  const Values values = read_values(w.addresses);
  const int64_t unit = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t col = indices.first_col + unit * N, group = col / view.group_size;
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int block_rows = static_cast<int>(rows_per_block(blockDim.y));
  if (kTable && view.family == Family::kFixedCodebook) {
    if (thread < 1 << kBits) tables[0][thread] = w.levels[thread];
    __syncthreads();
  }

  for (int64_t block = blockIdx.y; block < plan.row_blocks; block += gridDim.y) {
    const int64_t first = block * block_rows;
    if (kTable && view.family == Family::kLearnedCodebook) {
      __syncthreads();
      for (int i = thread; i < block_rows << kBits; i += kThreads) {
        const int64_t row = first + (i >> kBits);
        const unsigned code = i & ((1 << kBits) - 1);
        if (row < plan.rows)
          tables[i >> kBits][code] = learned_level(view, values, source_row(indices, row), code);
      }
      __syncthreads();
    }
    if (unit >= plan.units) continue;
    // All loads before the first use of one.
    UnitCodes codes[kRowsPerThread];
    UnitParameters parameters[kRowsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int64_t to = first + i * blockDim.y + threadIdx.y;
      if (to >= plan.rows) continue;
      const int64_t row = source_row(indices, to);
      codes[i] = load_unit<kBits, N>(view.codes + row * view.row_bytes, view.plane_bytes, col);
      parameters[i] = parameters_at(view, values, kDeviceDynamicMap, row, group);
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int in_block = static_cast<int>(i * blockDim.y + threadIdx.y);
      if (first + in_block >= plan.rows) continue;
      float v[N];
      decode_unit<kBits, N, kTable>(codes[i], parameters[i],
                                    table_of<kBits, kTable>(tables, w, in_block), v);
      static_cast<uint4*>(out)[(first + in_block) * plan.units + unit] = rounded<kType>(v);
    }
  }
}

// Any shape, any address: a weight a thread.
__global__ void __launch_bounds__(kThreads)
    dequantize_any(const __grid_constant__ DeviceWeight w, const RowIndices indices, int64_t count,
                   FloatType dtype, void* __restrict__ out) {
  const Values values = read_values(w.addresses);
  const int64_t cols = indices.cols, n = count * cols;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = source_row(indices, i / cols);
    store_one(out, dtype, i,
              weight_at(w, values, kDeviceDynamicMap, row, indices.first_col + i % cols));
  }
}

// Once more, for the weights that have an outlier: a warp a row.
__global__ void __launch_bounds__(kThreads, kThreeBlocks)
    add_outliers(const __grid_constant__ DeviceWeight w, const RowIndices indices, int64_t count,
                 FloatType dtype, void* __restrict__ out) {
  const Values values = read_values(w.addresses);
  const OutlierView& outliers = w.view.outliers;
  const int64_t warps = int64_t{gridDim.x} * kThreads / 32;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; i < count; i += warps) {
    const int64_t row = source_row(indices, i);
    const OutlierRange range = outlier_range(outliers, row);
    for (int64_t k = range.begin + threadIdx.x % 32; k < range.end; k += 32) {
      const int64_t col = column_of_outlier(w.view, k);
      const int64_t to = col - indices.first_col;
      if (to < 0 || to >= indices.cols) continue;
      const float dense = weight_at(w, values, kDeviceDynamicMap, row, col);
      store_one(out, dtype, i * indices.cols + to,
                dense + from_half(outliers.value[k]) * values.outlier_factor);
    }
  }
}

template <int kBits, FloatType kType>
bool is_aligned(const DeviceWeight& w, const RowIndices& indices, const void* out) {
  constexpr uintptr_t kCodes = unit_alignment<kBits, kUnit<kType>>();
  return indices.cols % kUnit<kType> == 0 && indices.first_col % kUnit<kType> == 0 &&
         w.view.row_bytes % kCodes == 0 &&
         reinterpret_cast<uintptr_t>(w.view.codes) % kCodes == 0 &&
         reinterpret_cast<uintptr_t>(out) % 16 == 0;
}

Status launch_any(const DeviceWeight& w, const RowIndices& indices, int64_t count, FloatType dtype,
                  void* out, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(count * indices.cols, &launch); !status.ok()) return status;
  return run("dequantize_any", dequantize_any, launch, 0, stream, w, indices, count, dtype, out);
}

template <int kBits, FloatType kType, bool kTable>
Status launch_rows(const DeviceWeight& w, const RowIndices& indices, int64_t count, void* out,
                   cudaStream_t stream) {
  RowPlan plan;
  if (Status status = plan_rows(count, indices.cols / kUnit<kType>, &plan); !status.ok())
    return status;
  const int64_t tables =
      w.view.family == Family::kLearnedCodebook ? rows_per_block(plan.launch.block_y) : 1;
  const size_t shared = kTable ? static_cast<size_t>(tables) * 16 * sizeof(float) : 0;
  // Rows of one unit: a block takes so many that there is no room for a codebook of each.
  if (shared > kMaxSharedBytes) return launch_any(w, indices, count, kType, out, stream);
  return run("dequantize_rows", dequantize_rows<kBits, kType, kTable>, plan.launch, shared, stream,
             w, indices, plan, out);
}

template <int kBits, FloatType kType>
Status decode_dense(const DeviceWeight& w, const RowIndices& indices, int64_t count, void* out,
                    cudaStream_t stream) {
  if (is_aligned<kBits, kType>(w, indices, out)) {
    if constexpr (kBits <= 4) {
      if (w.view.family != Family::kInteger)
        return launch_rows<kBits, kType, true>(w, indices, count, out, stream);
    }
    return launch_rows<kBits, kType, false>(w, indices, count, out, stream);
  }
  return launch_any(w, indices, count, kType, out, stream);
}

template <int kBits>
Status decode_bits(const DeviceWeight& w, const RowIndices& indices, int64_t count, FloatType dtype,
                   void* out, cudaStream_t stream) {
  switch (dtype) {
    case FloatType::kFloat32:
      return decode_dense<kBits, FloatType::kFloat32>(w, indices, count, out, stream);
    case FloatType::kFloat16:
      return decode_dense<kBits, FloatType::kFloat16>(w, indices, count, out, stream);
    default:
      return decode_dense<kBits, FloatType::kBFloat16>(w, indices, count, out, stream);
  }
}

Status decode(const DeviceWeight& w, const RowIndices& indices, int64_t count, FloatType dtype,
              void* out, cudaStream_t stream) {
  if (count == 0) return Status::success();
  const auto dense = w.view.bits == 8   ? decode_bits<8>
                     : w.view.bits == 4 ? decode_bits<4>
                     : w.view.bits == 3 ? decode_bits<3>
                                        : decode_bits<2>;
  if (Status status = dense(w, indices, count, dtype, out, stream); !status.ok()) return status;
  if (w.view.outliers.count == 0) return Status::success();
  Launch launch;
  if (Status status = plan_items(count * 32, &launch); !status.ok()) return status;
  return run("add_outliers", add_outliers, launch, 0, stream, w, indices, count, dtype, out);
}

}  // namespace

Status dequantize(const DeviceWeight& w, FloatType dtype, void* out, cudaStream_t stream) {
  return dequantize_window(w, 0, w.view.rows, 0, w.view.cols, dtype, out, stream);
}

Status dequantize_window(const DeviceWeight& w, int64_t first_row, int64_t rows, int64_t first_col,
                         int64_t cols, FloatType dtype, void* out, cudaStream_t stream) {
  return decode(w, {nullptr, false, first_row, first_col, cols}, rows, dtype, out, stream);
}

Status embedding(const DeviceWeight& w, const void* indices, bool wide, int64_t count,
                 FloatType dtype, void* out, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_items(count, &launch); !status.ok() || launch.empty()) return status;
  const RowIndices rows{indices, wide, 0, 0, w.view.cols};
  if (Status status =
          run("check_indices", check_indices, launch, 0, stream, rows, count, w.view.rows);
      !status.ok())
    return status;
  return decode(w, rows, count, dtype, out, stream);
}

}  // namespace bitfold::cuda
