#include "cuda/rounding.h"

#include "cuda/decode.h"
#include "cuda/places.cuh"
#include "cuda/rounder.cuh"
#include "cuda/source.cuh"

namespace bitfold::cuda {
namespace {

// load(row, col) of a matrix [rows, cols] to to[col * stride + row].
template <class T, class Load>
__device__ inline void transpose(int64_t rows, int64_t cols, int64_t stride, T* to,
                                 const Load& load) {
  __shared__ T tile[kTile][kTile + 1];
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int64_t across = tiles_across(cols), down = tiles_across(rows);
  for (int64_t at = blockIdx.x; at < across * down; at += gridDim.x) {
    const int64_t row = at / across * kTile, col = at % across * kTile;
    for (int i = y; i < kTile; i += kTileRows)
      if (row + i < rows && col + x < cols) tile[i][x] = load(row + i, col + x);
    __syncthreads();
    for (int i = y; i < kTile; i += kTileRows)
      if (row + x < rows && col + i < cols) to[(col + i) * stride + row + x] = tile[x][i];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    transpose_weights(const MatrixView w, const uint8_t* __restrict__ dead,
                      const RoundingMatrix to) {
  transpose<float>(w.rows, w.cols, to.stride, to.weights, [&](int64_t row, int64_t col) {
    return dead[col] ? 0.0f : load_weight(w, row, col);
  });
}

__global__ void __launch_bounds__(kThreads)
    transpose_bytes(const uint8_t* __restrict__ from, int64_t rows, int64_t cols, int64_t stride,
                    uint8_t* __restrict__ to) {
  transpose<uint8_t>(rows, cols, stride, to,
                     [&](int64_t row, int64_t col) { return from[row * cols + col]; });
}

__global__ void __launch_bounds__(kThreads)
    spread(const Spans spans, const float* __restrict__ from, int64_t stride,
           float* __restrict__ to, const RowPlan plan) {
  each_place(plan, [&](int64_t group, int64_t row) {
    to[group * stride + row] = from[(spans.rows == 1 ? 0 : row * spans.groups) + group];
  });
}

__global__ void __launch_bounds__(kThreads)
    collect(const Spans spans, const float* __restrict__ from, int64_t stride,
            float* __restrict__ to, const RowPlan plan) {
  each_place(plan, [&](int64_t row, int64_t group) {
    to[row * spans.groups + group] = from[group * stride + row];
  });
}

__global__ void __launch_bounds__(kThreads)
    read_codes(const __grid_constant__ DeviceWeight from, const RoundingMatrix to,
               const RowPlan plan) {
  const PackedView& view = from.view;
  each_place(plan, [&](int64_t col, int64_t row) {
    to.codes[col * to.stride + row] = static_cast<uint8_t>(
        extract_code(view.codes + row * view.row_bytes, view.cols, view.bits, col));
  });
}

__global__ void __launch_bounds__(kThreads)
    read_scales(const __grid_constant__ DeviceWeight from, const RoundingMatrix to,
                const RowPlan plan) {
  const Values values = read_values(from.addresses);
  each_place(plan, [&](int64_t group, int64_t row) {
    const UnitParameters p = parameters_at(from.view, values, kDeviceDynamicMap, row, group);
    to.scale[group * to.stride + row] = p.scale;
    to.zero[group * to.stride + row] = p.zero;
  });
}

// Eight codes of a row a thread; neighbours take the same columns of neighbouring rows.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    pack_units(const RoundingMatrix w, uint8_t* __restrict__ packed, const RowPlan plan) {
  const int64_t row_bytes = packed_row_bytes(w.cols, kBits);
  const int64_t plane_bytes = kBits == 3 ? (w.cols + 3) / 4 : 0;
  each_place(plan, [&](int64_t unit, int64_t row) {
    const int64_t col = unit * 8;
    const int n = static_cast<int>(w.cols - col < 8 ? w.cols - col : 8);
    unsigned code[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) code[j] = j < n ? w.codes[(col + j) * w.stride + row] : 0u;
    store_unit<kBits>(packed + row * row_bytes, plane_bytes, col, n, pack_unit<kBits>(code));
  });
}

template <bool kBook>
__global__ void __launch_bounds__(kThreads)
    round_places(const RoundingMatrix w, const __grid_constant__ DeviceEncoding encoding,
                 const int32_t* __restrict__ rows, int64_t count, float* __restrict__ errors,
                 const RowPlan plan) {
  __shared__ Bin bins[kBins];
  __shared__ float levels[kMaxLevels];
  const Rounder<kBook> rounder = make_rounder<kBook>(encoding, bins, levels);
  each_place(plan, [&](int64_t col, int64_t i) {
    const int64_t row = rows ? rows[i] : i;
    const int64_t at = col * w.stride + row, of_group = col / w.group_size * w.stride + row;
    const float v = w.weights[at], scale = w.scale[of_group];
    float unit;
    const unsigned code =
        rounder.round(v, inverse_scale(scale), kBook ? 0.0f : w.zero[of_group], &unit);
    errors[col * count + i] = w.exact && w.exact[at] ? 0.0f : v - unit * scale;
    if (!rows) w.codes[at] = static_cast<uint8_t>(code);
  });
}

__global__ void __launch_bounds__(kThreads)
    pick(const int32_t* __restrict__ position, const float* __restrict__ error, int64_t stride,
         const int32_t* __restrict__ rows, int64_t count, float* __restrict__ errors,
         const RowPlan plan) {
  each_place(plan, [&](int64_t col, int64_t i) {
    errors[col * count + i] = error[position[col] * stride + rows[i]];
  });
}

__global__ void __launch_bounds__(kThreads)
    decode_places(const RoundingMatrix w, const __grid_constant__ DeviceEncoding encoding,
                  const int32_t* __restrict__ position, float* __restrict__ error,
                  const RowPlan plan) {
  __shared__ float levels[kMaxLevels];
  fetch_levels(encoding, levels);
  each_place(plan, [&](int64_t col, int64_t row) {
    const int64_t at = col * w.stride + row;
    const float scale = w.scale[col / w.group_size * w.stride + row];
    const float off = w.weights[at] - unit_at(w, encoding, levels, col, row) * scale;
    error[int64_t{position[col]} * w.stride + row] = w.exact && w.exact[at] ? 0.0f : off;
  });
}

__global__ void __launch_bounds__(kThreads)
    gather(const int32_t* __restrict__ column, const float* __restrict__ from, int64_t stride,
           float* __restrict__ to, const RowPlan plan) {
  each_place(
      plan, [&](int64_t a, int64_t row) { to[a * stride + row] = from[column[a] * stride + row]; });
}

__global__ void __launch_bounds__(kThreads)
    add(const ColumnPlaces places, const float* __restrict__ from, int64_t stride,
        float* __restrict__ to, const RowPlan plan) {
  each_place(plan, [&](int64_t a, int64_t row) {
    const int64_t col = places.column[a];
    if (!places.dead[col]) to[col * stride + row] += from[a * stride + row];
  });
}

}  // namespace

Status lay_out_weights(const MatrixView& w, const uint8_t* dead, const RoundingMatrix& to,
                       cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_tiles(w.rows, w.cols, &launch); !status.ok()) return status;
  return run("transpose_weights", transpose_weights, launch, 0, stream, w, dead, to);
}

Status lay_out_exact(const uint8_t* exact, int64_t rows, int64_t cols, int64_t to_stride,
                     uint8_t* to, cudaStream_t stream) {
  Launch launch;
  if (Status status = plan_tiles(rows, cols, &launch); !status.ok()) return status;
  return run("transpose_bytes", transpose_bytes, launch, 0, stream, exact, rows, cols, to_stride,
             to);
}

Status spread_spans(const Spans& spans, const float* from, const RoundingMatrix& w, float* to,
                    cudaStream_t stream) {
  return run_places("spread", spread, spans.groups, w.rows, stream, spans, from, w.stride, to);
}

Status collect_spans(const Spans& spans, const float* from, const RoundingMatrix& w, float* to,
                     cudaStream_t stream) {
  return run_places("collect", collect, spans.rows, spans.groups, stream, spans, from, w.stride,
                    to);
}

Status read_packed(const DeviceWeight& from, const RoundingMatrix& to, cudaStream_t stream) {
  if (Status status = run_places("read_codes", read_codes, to.cols, to.rows, stream, from, to);
      !status.ok())
    return status;
  return run_places("read_scales", read_scales, to.groups, to.rows, stream, from, to);
}

Status pack_columns(const RoundingMatrix& w, int bits, uint8_t* packed, cudaStream_t stream) {
  const auto kernel = bits == 8   ? pack_units<8>
                      : bits == 4 ? pack_units<4>
                      : bits == 3 ? pack_units<3>
                                  : pack_units<2>;
  return run_places("pack_units", kernel, (w.cols + 7) / 8, w.rows, stream, w, packed);
}

Status round_plainly(const RoundingMatrix& w, const DeviceEncoding& encoding, const int32_t* rows,
                     int64_t count, float* errors, cudaStream_t stream) {
  const auto kernel = encoding.book ? round_places<true> : round_places<false>;
  return run_places("round_places", kernel, w.cols, count, stream, w, encoding, rows, count,
                    errors);
}

Status pick_errors(const RoundingMatrix& w, const ColumnPlaces& places, const float* error,
                   const int32_t* rows, int64_t count, float* errors, cudaStream_t stream) {
  return run_places("pick", pick, w.cols, count, stream, places.position, error, w.stride, rows,
                    count, errors);
}

Status decode_errors(const RoundingMatrix& w, const DeviceEncoding& encoding,
                     const ColumnPlaces& places, float* error, cudaStream_t stream) {
  return run_places("decode_places", decode_places, w.cols, w.rows, stream, w, encoding,
                    places.position, error);
}

Status gather_columns(const RoundingMatrix& w, const ColumnPlaces& places, const float* from,
                      float* to, cudaStream_t stream) {
  return run_places("gather", gather, w.cols, w.rows, stream, places.column, from, w.stride, to);
}

Status add_columns(const RoundingMatrix& w, const ColumnPlaces& places, const float* from,
                   float* to, cudaStream_t stream) {
  return run_places("add", add, w.cols, w.rows, stream, places, from, w.stride, to);
}

}  // namespace bitfold::cuda
