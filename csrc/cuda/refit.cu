#include "cuda/refit.h"

#include "core/scale_refit.h"
#include "cuda/places.cuh"
#include "cuda/rounder.cuh"

namespace bitfold::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, kFourBlocks)
    copy_hessian(const ColumnPlaces places, const float* __restrict__ hessian, int64_t low,
                 float* __restrict__ rows_of_h, const RowPlan plan) {
  each_place(plan, [&](int64_t j, int64_t b) {
    rows_of_h[j * plan.units + b] = hessian[int64_t{places.position[low + j]} * plan.units + b];
  });
}

__global__ void __launch_bounds__(kThreads)
    copy_inside(const ColumnPlaces places, const float* __restrict__ rows_of_h, int64_t cols,
                int64_t low, float* __restrict__ inside, const RowPlan plan) {
  each_place(plan, [&](int64_t j, int64_t i) {
    const bool counts = !places.dead[low + j] && !places.dead[low + i];
    inside[j * plan.units + i] = counts ? rows_of_h[j * cols + places.position[low + i]] : 0.0f;
  });
}

// A warp for a column.
__global__ void __launch_bounds__(kThreads)
    sum_groups(const float* __restrict__ inside, int64_t size, int64_t group_size,
               float* __restrict__ ones) {
  const int lane = threadIdx.x % 32;
  for (int64_t j = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; j < size;
       j += int64_t{gridDim.x} * (kThreads / 32)) {
    const int64_t first = j / group_size * group_size, end = min(first + group_size, size);
    float sum = 0.0f;
    for (int64_t i = first + lane; i < end; i += 32) sum = sum + inside[j * size + i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum = sum + __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) ones[j] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    decode_section(const RoundingMatrix w, const __grid_constant__ DeviceEncoding encoding,
                   int64_t low, float* __restrict__ units, const RowPlan plan) {
  __shared__ float levels[kMaxLevels];
  fetch_levels(encoding, levels);
  each_place(plan, [&](int64_t j, int64_t row) {
    const int64_t at = (low + j) * w.stride + row;
    units[j * w.stride + row] =
        w.exact && w.exact[at] ? 0.0f : unit_at(w, encoding, levels, low + j, row);
  });
}

constexpr int kRowParts = 8;  // threads to a row
constexpr int kRefitRows = kThreads / kRowParts;

struct Group {
  int64_t first, size;  // columns, counted from the section's
  int64_t of_row;       // where its scales begin
};

// kRefitRows neighbouring rows to a block, the columns of the group shared out among kRowParts
// threads of each.
__global__ void __launch_bounds__(kThreads)
    refit_rows(const RoundingMatrix w, const ColumnPlaces places, const RefitSection section,
               const Group group, const StoredRounding rounding, const int8_t* exponent,
               bool moves_zero, float* __restrict__ error, double* __restrict__ loss,
               unsigned long long* changed) {
  __shared__ RefitSums parts[kRefitRows][kRowParts];
  __shared__ RefitChoice choices[kRefitRows];
  const int in_block = threadIdx.x % kRefitRows, part = threadIdx.x / kRefitRows;
  const int64_t row = int64_t{blockIdx.x} * kRefitRows + in_block;
  const bool inside = row < w.rows;
  RefitSums sums{};
  for (int64_t j = group.first + part; inside && j < group.first + group.size; j += kRowParts) {
    if (places.dead[section.low + j]) continue;
    const int64_t at = j * w.stride + row;
    const double d = section.units[at], he = section.he[at], one = section.ones[j];
    sums.add({d * he, he, d * section.hd[at], d * one, one});
  }
  parts[in_block][part] = sums;
  __syncthreads();
  const int64_t of_row = group.of_row + row;
  const float scale = inside ? w.scale[of_row] : 0.0f, zero = inside ? w.zero[of_row] : 0.0f;
  if (part == 0 && inside) {
    for (int i = 1; i < kRowParts; ++i) sums.add(parts[in_block][i]);
    const int e = exponent ? *exponent : 0;
    const RefitChoice choice = choose_refit(sums, scale, zero, moves_zero,
                                            [&](float* s, float* z) { rounding.apply(e, s, z); });
    choices[in_block] = choice;
    if (choice.change < 0.0) {
      loss[row] += choice.change;
      atomicAdd(changed, 1ull);
    }
  }
  __syncthreads();  // all parts have read the old scale
  if (!inside) return;
  const RefitChoice choice = choices[in_block];
  if (part == 0) {
    w.scale[of_row] = choice.scale;
    w.zero[of_row] = choice.zero;
  }
  for (int64_t j = group.first + part; j < group.first + group.size; j += kRowParts) {
    const int64_t column = section.low + j, at = column * w.stride + row;
    float& stored = error[int64_t{places.position[column]} * w.stride + row];
    const bool same = !(choice.change < 0.0) || (w.exact && w.exact[at]);
    const float unit = section.units[j * w.stride + row] + (zero - choice.zero);
    const float old = stored, now = same ? old : w.weights[at] - unit * choice.scale;
    section.change[j * w.stride + row] = now - old;
    stored = now;
  }
}

}  // namespace

Status gather_hessian(const RoundingMatrix& w, const ColumnPlaces& places, const float* hessian,
                      const RefitSection& section, cudaStream_t stream) {
  if (Status status = run_places("copy_hessian", copy_hessian, section.size, w.cols, stream, places,
                                 hessian, section.low, section.rows_of_h);
      !status.ok())
    return status;
  if (Status status = run_places("copy_inside", copy_inside, section.size, section.size, stream,
                                 places, section.rows_of_h, w.cols, section.low, section.inside);
      !status.ok())
    return status;
  Launch launch;
  if (Status status = plan_items(section.size * 32, &launch); !status.ok()) return status;
  return run("sum_groups", sum_groups, launch, 0, stream, section.inside, section.size,
             w.group_size, section.ones);
}

Status decode_units(const RoundingMatrix& w, const DeviceEncoding& encoding,
                    const RefitSection& section, cudaStream_t stream) {
  return run_places("decode_section", decode_section, section.size, w.rows, stream, w, encoding,
                    section.low, section.units);
}

Status refit_group(const RoundingMatrix& w, const DeviceEncoding& encoding,
                   const ColumnPlaces& places, const RefitSection& section, int64_t group,
                   const int8_t* exponent, float* error, double* loss, unsigned long long* changed,
                   cudaStream_t stream) {
  const int64_t first = group * w.group_size - section.low, rest = section.size - first;
  const bool zero_moves = !encoding.book && encoding.zero == Zero::kFloat;
  const Launch launch = blocks(static_cast<uint32_t>((w.rows + kRefitRows - 1) / kRefitRows));
  return run("refit_rows", refit_rows, launch, 0, stream, w, places, section,
             Group{first, rest < w.group_size ? rest : w.group_size, group * w.stride},
             StoredRounding{exponent != nullptr, zero_moves}, exponent, zero_moves && !w.exact,
             error, loss, changed);
}

}  // namespace bitfold::cuda
