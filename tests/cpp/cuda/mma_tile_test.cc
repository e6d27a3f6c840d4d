// linear_mma, lane by lane on the host: the same index maps, copies, tables and operands, with the
// instruction done in plain C++ from its documented fragments. What it proves is that every code
// meets the x that it belongs to; how the GPU waits and synchronises it cannot see.
#include <algorithm>
#include <array>
#include <cmath>

#include "core/reference/reference.h"
#include "cuda/level_factor.h"
#include "cuda/linear_plan.h"
#include "cuda/mma_maps.h"
#include "support.h"

namespace bitfold::cuda {
namespace {

using bitfold::testing::format_of;
using bitfold::testing::Owned;

float as_float(uint32_t bits, FloatType type) {
  return type == FloatType::kFloat16 ? half_to_float(static_cast<uint16_t>(bits))
                                     : bfloat16_to_float(static_cast<uint16_t>(bits));
}

// D += A B as PTX has it: fragments of m16n8k16, row.col.
void mma(const MmaA (&a)[32], const uint32_t (&b)[32][2], FloatType type, float (&d)[32][4]) {
  float A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      A[row][col] = as_float(a[lane].word[i / 2] >> (i % 2 * 16), type);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
      B[row][group] = as_float(b[lane][i / 2] >> (i % 2 * 16), type);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), col = (lane & 3) * 2 + (i & 1);
      for (int k = 0; k < 16; ++k) d[lane][i] += A[row][k] * B[k][col];
    }
  }
}

uint32_t word_at(const std::vector<uint8_t>& memory, int at) {
  uint32_t word;
  memcpy(&word, memory.data() + at, 4);
  return word;
}

// One block of the kernel after the other. Shared memory is a vector of exactly the planned size.
template <int kBits, FloatType kType, Decoding kDecoding = kOnlyDecoding<kBits>>
struct Emulated {
  using C = Chunk<kBits>;
  const DeviceWeight& w;
  const MmaPlan& plan;
  const std::vector<uint16_t>& x;  // [m, cols]
  std::vector<float> y;            // [m, rows]
  float factor = 1.0f;             // of levels
  std::vector<uint8_t> shared;

  Emulated(const DeviceWeight& weight, const MmaPlan& p, const std::vector<uint16_t>& activations)
      : w(weight),
        plan(p),
        x(activations),
        y(static_cast<size_t>(p.m * weight.view.rows)),
        shared(static_cast<size_t>(p.shared_bytes), 0xff) {
    factor = level_factor(w, kType);
    for (int i = 0; i < kTableEntries<kBits> * 32; ++i) {
      const uint32_t entry = table_entry<kBits, kType>(w, static_cast<unsigned>(i / 32), factor);
      memcpy(&shared[static_cast<size_t>(i) * 4], &entry, 4);
    }
    for (int64_t tile = 0; tile < plan.row_tiles * plan.slices; ++tile) run(tile);
  }

  void put(int at, float v) { memcpy(&shared.at(static_cast<size_t>(at + 3)) - 3, &v, 4); }
  float get(int at) const { return float_from_bits(word_at(shared, at)); }

  void stage_slab(int64_t row, int64_t first, int segments) {
    const PackedView& view = w.view;
    const Values values = read_values(w.addresses);
    const int m = static_cast<int>(plan.m);
    for (int column = 0; column < m; ++column) {
      for (int unit = 0; unit < segments * 8; ++unit) {
        const int to = plan.x + x_place_of_unit(unit, column, plan.x_columns());
        ASSERT_LE(to + 16, plan.sums);
        uint16_t numbers[8];
        for (int j = 0; j < 8; ++j) {
          const int64_t k = first * kSegment + unit * 8 + j;
          numbers[j] = k < view.cols ? x[static_cast<size_t>(column * view.cols + k)] : 0;
        }
        uint32_t words[4];
        memcpy(words, numbers, sizeof words);
        if (kInterleaved<kBits, kDecoding>) interleave(words);
        memcpy(&shared[static_cast<size_t>(to)], words, sizeof words);
      }
    }
    const uint32_t inverse = inverse_of_segments(view);
    for (int r = 0; r < plan.rows_per_tile(); ++r) {
      for (int s = 0; s < segments; ++s) {
        const auto segment = static_cast<uint32_t>(std::min(first + s, (view.cols - 1) / kSegment));
        const int64_t group =
            inverse ? static_cast<int64_t>(uint64_t{segment} * inverse >> 32) : segment;
        const int64_t at = std::min(row + r, view.rows - 1);
        const float scale = scale_at(view, values, kDynamicMap, at, group) / factor;
        const int place = (s * plan.scale_stride() + r) * 4;
        put(plan.scales + place, scale);
        if (is_shifted(view))
          put(plan.shifts + place, (middle_of(view) - zero_at(view, at, group)) * scale);
      }
    }
    if (!is_shifted(view)) return;
    for (int s = 0; s < segments; ++s) {
      for (int column = 0; column < plan.sum_stride(); ++column) {
        float sum = 0.0f;
        for (int64_t k = (first + s) * kSegment; k < (first + s + 1) * kSegment; ++k)
          if (column < m && k < view.cols)
            sum += as_float(x[static_cast<size_t>(column * view.cols + k)], kType);
        put(plan.sums + (s * plan.sum_stride() + column) * 4, sum);
      }
    }
  }

  void fetch(int64_t row, int64_t chunk, int stage) {
    const PackedView& view = w.view;
    const int64_t plane = kBits == 3 ? view.plane_bytes : view.row_bytes;
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < C::kCopies; ++i) {
        const Copy copy = copy_of<kBits>(i, lane);
        const int64_t bytes = copy.high ? view.row_bytes - plane : plane;
        const int64_t at = chunk * (copy.high ? C::kHighBytes : C::kRowBytes) + copy.source;
        uint8_t* to = &shared[static_cast<size_t>(stage + copy.target)];
        ASSERT_LE(copy.target + 16, C::kBytes);
        memset(to, 0, 16);
        if (at >= bytes) continue;
        ASSERT_LE(at + 16, bytes);
        const int64_t from = std::min(row + copy.row, view.rows - 1);
        memcpy(to, view.codes + from * view.row_bytes + (copy.high ? plane : 0) + at, 16);
      }
    }
  }

  void multiply(int stage, int row_warp, int segment, std::vector<std::array<float, 4>>* acc) {
    const int m = static_cast<int>(plan.m);
    for (int s = 0; s < C::kSegments; ++s, ++segment) {
      MmaA a[kSteps][32];
      for (int lane = 0; lane < 32; ++lane) {
        const Lane at = lane_of(lane);
        const uint8_t* from = &shared[static_cast<size_t>(stage)];
        const LaneCodes upper = load_codes<kBits>(from, at.row, s, at.quarter);
        const LaneCodes lower = load_codes<kBits>(from, at.row + 8, s, at.quarter);
        for (int step = 0; step < kSteps; ++step)
          a[step][lane] =
              operand_of<kBits, kType, kDecoding>(upper, lower, step, lane, shared.data());
      }
      for (int n = 0; n < plan.column_tiles; ++n) {
        float d[32][4] = {};
        for (int step = 0; step < kSteps; ++step) {
          uint32_t b[32][2];
          for (int lane = 0; lane < 32; ++lane) {
            const Lane at = lane_of(lane);
            const int column =
                plan.column_tiles == 1 ? std::min(at.row, m - 1) : n * kMmaColumns + at.row;
            const int place =
                plan.x + x_place(segment, step / 2, column, plan.x_columns(), at.quarter);
            ASSERT_LE(place + 16, plan.sums);
            b[lane][0] = word_at(shared, place + step % 2 * 8);
            b[lane][1] = word_at(shared, place + step % 2 * 8 + 4);
          }
          mma(a[step], b, kType, d);
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = row_warp * kMmaRows + accumulator_row(lane, i);
            const int place = (segment * plan.scale_stride() + row) * 4;
            float& sum = (*acc)[static_cast<size_t>(n * 32 + lane)][static_cast<size_t>(i)];
            sum += get(plan.scales + place) * d[lane][i];
            if (!is_shifted(w.view)) continue;
            const int column = n * kMmaColumns + accumulator_column(lane, i);
            sum += get(plan.shifts + place) *
                   get(plan.sums + (segment * plan.sum_stride() + column) * 4);
          }
        }
      }
    }
  }

  void run(int64_t tile) {
    const int64_t slice = tile / plan.row_tiles;
    const int64_t row = (tile - slice * plan.row_tiles) * plan.rows_per_tile();
    const int64_t begin = slice * plan.slice_chunks;
    const int64_t end = std::min<int64_t>(begin + plan.slice_chunks, plan.chunks);
    std::vector<std::vector<std::array<float, 4>>> acc(
        static_cast<size_t>(plan.warps),
        std::vector<std::array<float, 4>>(static_cast<size_t>(plan.column_tiles) * 32));
    for (int64_t slab = begin; slab < end; slab += plan.slab_chunks) {
      const int64_t slab_end = std::min(slab + plan.slab_chunks, end);
      stage_slab(row, slab * C::kSegments, static_cast<int>(slab_end - slab) * C::kSegments);
      for (int64_t chunk = slab; chunk < slab_end; ++chunk) {
        for (int row_warp = 0; row_warp < plan.row_warps; ++row_warp) {
          const int warp = row_warp * plan.k_warps + static_cast<int>(chunk % plan.k_warps);
          const int stage =
              plan.rings + (warp * kStages + static_cast<int>(chunk) % kStages) * C::kBytes;
          ASSERT_LE(stage + C::kBytes, plan.x);
          fetch(row + row_warp * kMmaRows, chunk, stage);
          multiply(stage, row_warp, static_cast<int>(chunk - slab) * C::kSegments,
                   &acc[static_cast<size_t>(warp)]);
        }
      }
    }
    for (int warp = 0; warp < plan.warps; ++warp) {
      for (int n = 0; n < plan.column_tiles; ++n) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int64_t r = row + warp / plan.k_warps * kMmaRows + accumulator_row(lane, i);
            const int64_t column = n * kMmaColumns + accumulator_column(lane, i);
            if (r >= w.view.rows || column >= plan.m) continue;
            y[static_cast<size_t>(column * w.view.rows + r)] +=
                acc[static_cast<size_t>(warp)][static_cast<size_t>(n * 32 + lane)]
                   [static_cast<size_t>(i)];
          }
        }
      }
    }
  }
};

template <FloatType kType>
std::vector<float> emulate(const DeviceWeight& w, const MmaPlan& plan,
                           const std::vector<uint16_t>& x) {
  switch (w.view.bits) {
    case 8:
      return Emulated<8, kType>(w, plan, x).y;
    case 4:
      if (decoding_of(w.view) == Decoding::kArithmetic)
        return Emulated<4, kType, Decoding::kArithmetic>(w, plan, x).y;
      return Emulated<4, kType>(w, plan, x).y;
    case 3:
      return Emulated<3, kType>(w, plan, x).y;
    default:
      return Emulated<2, kType>(w, plan, x).y;
  }
}

// Levels of a codebook are rounded to kType; the rest is fp32.
double allowed(const PackedView& view, FloatType type) {
  if (view.family == Family::kInteger) return 1e-5;
  return type == FloatType::kFloat16 ? std::ldexp(1.0, -11) : std::ldexp(1.0, -8);
}

template <FloatType kType>
void check(const std::string& text, int64_t m, int64_t rows, int64_t cols, const GpuLimits& gpu) {
  SCOPED_TRACE(text + " " + std::to_string(m) + "x" + std::to_string(rows) + "x" +
               std::to_string(cols));
  Owned w(format_of(text.c_str()), rows, cols);
  w.fill_randomly(static_cast<unsigned>(rows + cols));
  const PackedView view = w.view();
  std::vector<const void*> buffers;
  for (size_t i = 0; i < w.format().buffers(rows, cols).size(); ++i)
    buffers.push_back(w.pointer(i));
  const DeviceWeight weight = make_device_weight(w.format(), rows, cols, buffers.data());

  std::vector<float> floats = bitfold::testing::random_weights(m * cols, 7);
  std::vector<uint16_t> x(floats.size());
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = kType == FloatType::kFloat16 ? float_to_half(floats[i]) : float_to_bfloat16(floats[i]);
    floats[i] = as_float(x[i], kType);
  }
  ASSERT_TRUE(suits_mma(view));
  MmaPlan plan;
  ASSERT_TRUE(plan_mma(view, m, gpu, &plan));
  const std::vector<float> y = emulate<kType>(weight, plan, x);

  std::vector<float> dense(static_cast<size_t>(rows * cols));
  reference::dequantize(view, dense.data());
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      double want = 0.0, size = 0.0;
      for (int64_t c = 0; c < cols; ++c) {
        const double product = double{floats[static_cast<size_t>(i * cols + c)]} *
                               dense[static_cast<size_t>(r * cols + c)];
        want += product;
        size += std::fabs(product);
      }
      ASSERT_NEAR(y[static_cast<size_t>(i * rows + r)], want, allowed(view, kType) * size + 1e-6)
          << "y[" << i << ", " << r << "]";
    }
  }
}

constexpr GpuLimits kHopper{132, 227 * 1024}, kSmall{4, 99 * 1024};

TEST(MmaTile, EveryCodeMeetsItsX) {
  for (const char* text :
       {"nf4", "nf4-nodq", "fp4", "log4-g128", "int4-g64", "int4-g128-sym", "int4-row-fz",
        "int4-tensor", "int4-g64-midrise", "nf3", "int3-g64", "int3-g128-dq", "nf2", "int2-g64",
        "int2-g64-zp", "int8-row", "int8-g64-zp", "int8-tensor-midrise"}) {
    check<FloatType::kFloat16>(text, 3, 21, 384, kHopper);
    check<FloatType::kBFloat16>(text, 9, 16, 640, kSmall);
  }
}

TEST(MmaTile, RaggedRowsColumnsAndBatches) {
  for (int64_t m : {1, 2, 7, 8, 17, 33, 64})
    check<FloatType::kFloat16>("int4-g64", m, 50, 352, kHopper);
  check<FloatType::kFloat16>("nf4", 1, 1, 32, kHopper);
  check<FloatType::kFloat16>("int8-row", 5, 1, 16, kHopper);
  check<FloatType::kFloat16>("int8-row", 2, 130, 208, kSmall);
  check<FloatType::kBFloat16>("int2-g64", 1, 40, 64, kHopper);
  check<FloatType::kBFloat16>("nf3", 1, 17, 128, kSmall);
}

TEST(MmaTile, SeveralSlabsAndSlices) {
  check<FloatType::kFloat16>("int4-g64", 64, 16, 4096, kSmall);
  check<FloatType::kBFloat16>("int3-g64", 16, 32, 3968, {132, 99 * 1024});
  check<FloatType::kFloat16>("int8-g64-zp", 1, 16, 8192, {132, 227 * 1024});
}

TEST(MmaTile, LevelsTimesAFactorFitBfloat16Better) {
  const auto error = [](const float* levels, int count, float factor) {
    double sum = 0.0, size = 0.0;
    for (int i = 0; i < count; ++i) {
      const double off =
          bfloat16_to_float(float_to_bfloat16(levels[i] * factor)) / double{factor} - levels[i];
      sum += off * off;
      size += double{levels[i]} * levels[i];
    }
    return std::sqrt(sum / size);
  };
  for (const char* text : {"nf4", "nf3", "nf2", "fp4", "log4"}) {
    const Owned w(format_of(text), 1, 64);
    std::vector<const void*> buffers;
    for (size_t i = 0; i < w.format().buffers(1, 64).size(); ++i) buffers.push_back(w.pointer(i));
    const DeviceWeight weight = make_device_weight(w.format(), 1, 64, buffers.data());
    const int count = 1 << weight.view.bits;
    for (int turn = 0; turn < 2; ++turn) {
      const float factor = level_factor(weight, FloatType::kBFloat16);
      EXPECT_GE(factor, 1.0f);
      EXPECT_LT(factor, 2.0f);
      EXPECT_LE(error(weight.levels, count, factor), error(weight.levels, count, 1.0f)) << text;
      EXPECT_LE(error(weight.levels, count, factor), 0.9e-3) << text;
    }
    EXPECT_EQ(level_factor(weight, FloatType::kFloat16), 1.0f);
  }
}

}  // namespace
}  // namespace bitfold::cuda
