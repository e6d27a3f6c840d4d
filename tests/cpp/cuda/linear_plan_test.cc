// How products are cut up: every row, column and slice once, and never more than the GPU has.
#include "cuda/linear_plan.h"

#include "cuda/mma_maps.h"
#include "cuda/plan_cache.h"
#include "support.h"

namespace bitfold::cuda {
namespace {

using bitfold::testing::format_of;

PackedView view_of(const std::string& text, int64_t rows, int64_t cols) {
  const void* none[kMaxBuffers] = {};
  ValueAddresses addresses;
  return make_unread_view(format_of(text.c_str()), rows, cols, none, &addresses);
}

// The data-centre parts, the desktop parts, and a small one.
constexpr GpuLimits kGpus[] = {
    {132, 227 * 1024}, {108, 163 * 1024}, {84, 99 * 1024}, {4, 99 * 1024}};

void check_plan(const PackedView& w, int64_t m, const GpuLimits& gpu) {
  MmaPlan plan;
  ASSERT_TRUE(plan_mma(w, m, gpu, &plan));
  EXPECT_EQ(plan.m, m);
  EXPECT_GE(plan.column_tiles * 8, m);
  EXPECT_TRUE(plan.column_tiles == 1 || plan.column_tiles * 4 < m);
  EXPECT_LE(plan.warps, most_mma_warps(plan.column_tiles));
  EXPECT_EQ(plan.row_warps * plan.k_warps, plan.warps);
  EXPECT_GE(plan.row_tiles * plan.rows_per_tile(), w.rows);
  EXPECT_LT((plan.row_tiles - 1) * plan.rows_per_tile(), w.rows);
  const int codes = w.bits == 8 ? 128 : 256;
  EXPECT_GE(int64_t{plan.chunks} * codes, w.cols);
  EXPECT_LT(int64_t{plan.chunks - 1} * codes, w.cols);
  EXPECT_GE(plan.slices * plan.slice_chunks, plan.chunks);
  EXPECT_LT((plan.slices - 1) * plan.slice_chunks, plan.chunks);  // none is empty
  // Which warp has a chunk does not depend on the slab.
  EXPECT_GT(plan.slab_chunks, 0);
  EXPECT_EQ(plan.slab_chunks % plan.k_warps, 0);
  EXPECT_LE(plan.shared_bytes, gpu.shared_bytes);
  EXPECT_GE(plan.grid, 1u);
  EXPECT_LE(plan.grid, static_cast<uint32_t>(gpu.multiprocessors));
  EXPECT_LE(plan.grid, plan.row_tiles * plan.slices);
  for (int at : {plan.rings, plan.x, plan.sums}) EXPECT_EQ(at % 16, 0);
  EXPECT_LE(plan.x, plan.sums);
  EXPECT_LE(plan.sums, plan.scales);
  EXPECT_LE(plan.scales, plan.shifts);
  EXPECT_LE(plan.shifts, plan.shared_bytes);
  EXPECT_EQ(plan.partials(w.rows), plan.slices > 1 ? plan.slices * m * w.rows : 0);
}

TEST(LinearPlan, EveryShapeThatSuits) {
  for (const GpuLimits& gpu : kGpus) {
    for (const char* text :
         {"nf4", "int4-g64", "int3-g64", "int2-g64", "int8-row", "int8-g64-zp"}) {
      for (int64_t rows : {1, 15, 16, 17, 1000, 4096, 28672, 152064}) {
        for (int64_t cols : {128, 384, 4096, 14336, 65536}) {
          for (int64_t m : {1, 2, 8, 9, 16, 31, 64}) {
            SCOPED_TRACE(std::string(text) + " " + std::to_string(m) + "x" + std::to_string(rows) +
                         "x" + std::to_string(cols) + " on " + std::to_string(gpu.multiprocessors));
            check_plan(view_of(text, rows, cols), m, gpu);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(LinearPlan, ExtremesAreCutOrRefused) {
  for (const GpuLimits& gpu : kGpus) {
    check_plan(view_of("int8-row", 1, 16), 1, gpu);
    check_plan(view_of("nf4", 1, 1 << 24), 64, gpu);
    check_plan(view_of("int2-g64", int64_t{1} << 26, 64), 1, gpu);
  }
  MmaPlan plan;
  EXPECT_FALSE(plan_mma(view_of("nf4", 1, (1 << 24) + 32), 1, kGpus[0], &plan));
  EXPECT_FALSE(plan_mma(view_of("nf4", int64_t{1} << 40, 64), 1, kGpus[0], &plan));
  EXPECT_FALSE(plan_mma(view_of("nf4", 64, 64), 64, GpuLimits{1, 16 * 1024}, &plan));
}

TEST(LinearPlan, BusyMultiprocessorsWhereThereIsWork) {
  MmaPlan plan;
  for (int64_t m : {1, 16}) {
    ASSERT_TRUE(plan_mma(view_of("nf4", 8192, 8192), m, kGpus[0], &plan));
    EXPECT_GE(plan.grid, 120u) << m;
    ASSERT_TRUE(plan_mma(view_of("nf4", 4096, 4096), m, kGpus[0], &plan));
    EXPECT_GE(plan.grid, 120u) << m;
    ASSERT_TRUE(plan_mma(view_of("nf4", 1024, 8192), m, kGpus[0], &plan));
    EXPECT_GE(plan.grid, 60u) << m;
  }
}

TEST(LinearPlan, ARememberedPlanIsThatOfItsShape) {
  for (int turn = 0; turn < 2; ++turn) {
    for (int64_t m : {1, 5, 64}) {
      for (int64_t rows : {64, 4096}) {
        for (const char* text : {"int4-g64", "int4-g64-sym"}) {
          const PackedView w = view_of(text, rows, 1024);
          MmaPlan want, got;
          ASSERT_TRUE(plan_mma(w, m, kGpus[0], &want));
          ASSERT_TRUE(cached_plan(w, m, kGpus[0], &got));
          EXPECT_EQ(got.shared_bytes, want.shared_bytes);
          EXPECT_EQ(got.m, m);
          EXPECT_EQ(got.row_tiles, want.row_tiles);
        }
      }
    }
  }
}

TEST(LinearPlan, WaysOfEveryKindOfProduct) {
  const auto way = [](const char* text, int64_t cols, FloatType x, int64_t m, bool floats = false,
                      bool aligned = true) {
    return choose_way(view_of(text, 64, cols), x, m, floats, aligned);
  };
  constexpr FloatType kHalf = FloatType::kFloat16, kFloat = FloatType::kFloat32;
  EXPECT_EQ(way("nf4", 128, kHalf, 0), Way::kNothing);
  EXPECT_EQ(way("nf4", 128, kHalf, 1), Way::kMma);
  EXPECT_EQ(way("nf4", 128, kHalf, 64), Way::kMma);
  EXPECT_EQ(way("nf4", 128, kHalf, 128), Way::kMma);
  EXPECT_EQ(way("nf4", 128, kHalf, 129), Way::kSlabs);
  EXPECT_EQ(way("nf4", 128, kFloat, 1), Way::kAny);
  EXPECT_EQ(way("nf4", 128, kHalf, 1, true), Way::kAny);
  EXPECT_EQ(way("nf4", 128, kHalf, 1, false, false), Way::kAny);
  EXPECT_EQ(way("nf4", 120, kHalf, 1), Way::kAny);
  EXPECT_EQ(way("nf4-g32", 128, kHalf, 1), Way::kAny);
  EXPECT_EQ(way("nf4-outliers", 128, kHalf, 1), Way::kAny);
  EXPECT_EQ(way("kmeans4-row", 128, kHalf, 1), Way::kAny);
  EXPECT_EQ(way("kmeans4-row", 128, kHalf, 1000), Way::kSlabs);
  EXPECT_EQ(way("int8-tensor", 48, kHalf, 8), Way::kMma);
}

// The list of tests/gpu/sanitized.py: on every kind of GPU the kernels are watched that are meant.
TEST(LinearPlan, WhatTheSanitizerWatches) {
  const auto plan_of = [](const PackedView& w, int64_t m, const GpuLimits& gpu) {
    MmaPlan plan;
    for (FloatType x : {FloatType::kFloat16, FloatType::kBFloat16})
      EXPECT_EQ(choose_way(w, x, m, false, true), Way::kMma);
    EXPECT_TRUE(plan_mma(w, m, gpu, &plan));
    return plan;
  };
  for (const GpuLimits& gpu : kGpus) {
    SCOPED_TRACE(gpu.multiprocessors);
    for (const char* text :
         {"nf4", "int4-g64", "int8-row", "int8-g64-zp", "int3-g64", "int2-g64"}) {
      for (const auto& [m, tiles] :
           {std::pair<int64_t, int>{1, 1}, {9, 2}, {20, 4}, {40, 8}, {64, 8}})
        EXPECT_EQ(plan_of(view_of(text, 33, 384), m, gpu).column_tiles, tiles) << text;
    }
    for (const char* text : {"nf4", "int4-g64-dq"})
      EXPECT_GT(plan_of(view_of(text, 16, 16384), 1, gpu).slices, 1) << text;
    const MmaPlan long_slices = plan_of(view_of("int4-g64", 16, 65536), 64, gpu);
    EXPECT_GT(long_slices.slice_chunks, long_slices.slab_chunks);
  }
  for (const char* text : {"nf4", "int3-g64"}) {
    for (FloatType x : {FloatType::kFloat16, FloatType::kBFloat16})
      EXPECT_EQ(choose_way(view_of(text, 33, 384), x, 130, false, true), Way::kSlabs);
  }
}

TEST(LinearPlan, AnyShapeHasAGrid) {
  for (int64_t m : {int64_t{1}, int64_t{8}, int64_t{9}, int64_t{1} << 40}) {
    for (int64_t rows : {int64_t{1}, int64_t{17}, int64_t{1} << 44}) {
      const AnyPlan plan = plan_any(m, rows);
      EXPECT_GE(plan.grid_x, 1u);
      EXPECT_GE(plan.grid_y, 1u);
      EXPECT_LE(plan.grid_y, 65535u);
      EXPECT_GE(plan.row_blocks * kAnyRows * kAnyWarps, rows);
      EXPECT_GE(plan.column_blocks * plan.columns, m);
    }
  }
}

TEST(LinearPlan, PassesShareTheRowsOut) {
  for (int64_t m = 1; m <= 300; ++m) {
    const int64_t pass = mma_pass(m), passes = (m + pass - 1) / pass;
    EXPECT_LE(pass, kMaxMmaColumns);
    EXPECT_EQ(passes, (m + kMaxMmaColumns - 1) / kMaxMmaColumns) << m;
    EXPECT_GT(m - (passes - 1) * pass, pass - passes) << m;  // the last is hardly shorter
  }
}

TEST(LinearPlan, SlabsStayWithinTheScratch) {
  for (const GpuLimits& gpu : kGpus) {
    for (FloatType dtype : {FloatType::kFloat32, FloatType::kFloat16}) {
      for (int64_t other : {1, 64, 8192, 152064}) {
        for (int64_t length : {1, 63, 64, 257, 8192, 152064}) {
          for (int64_t m : {1, 129, 4096, 1 << 20}) {
            const int64_t slab = slab_length(length, other, m, dtype, gpu);
            EXPECT_GE(slab, 1);
            EXPECT_LE(slab, length);
            if (slab < length) {
              EXPECT_EQ(slab % 64, 0);
            }
            if (slab > 64) {
              EXPECT_LE(slab * other * size_of(dtype), int64_t{64} << 20);
            }
          }
        }
      }
    }
  }
}

// Tiles of 128 x 256 fill whole rounds of the multiprocessors, or nearly so.
TEST(LinearPlan, SlabsKeepMultiprocessorsBusy) {
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{8192, 8192}, {28672, 8192}, {4096, 4096}}) {
    for (int64_t m : {1024, 2048, 4096, 16384}) {
      const int64_t slab = slab_length(rows, cols, m, FloatType::kBFloat16, kGpus[0]);
      const int64_t tiles = (m + 127) / 128 * (slab / 256);
      const int64_t rounds = (tiles + 131) / 132;
      EXPECT_GE(tiles, rounds * 132 * 9 / 10) << rows << "x" << cols << ", " << m << ": " << slab;
    }
  }
}

}  // namespace
}  // namespace bitfold::cuda
