#include "cuda/linear_plan.h"

#include <algorithm>
#include <cmath>

#include "cuda/mma_maps.h"

namespace bitfold::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// ---- the table of switch-overs. Computed from how many bytes and instructions each way needs
// (docs/architecture.md), not yet measured on a GPU.

// Up to so many rows of x, in passes that each read the weight; after two of them slabs are as
// quick.
constexpr int64_t kMostRowsOfMma = 2 * kMaxMmaColumns;
// fp32 arithmetic: every eight rows of x decode the weight once more, which dense matrices do once.
constexpr int64_t kMostRowsOfAny = 32;

// So that sixteen rows of codes, and a tile's scales, are counted in 32 bits.
constexpr int64_t kMostColumns = int64_t{1} << 24;

constexpr int64_t kMostTiles = int64_t{1} << 26;  // times 32 slices at most

// Bytes of dense weight in scratch: at most, unless the shortest slab has more of them; and what L2
// keeps between writing and reading.
constexpr int64_t kSlabBytes = int64_t{64} << 20;
constexpr int64_t kKeptBytes = int64_t{24} << 20;
constexpr int64_t kSlabUnit = 256, kShortestSlab = 64;  // sides of tiles

// ---- what a cut costs, in nanoseconds; proportions of an H200, not yet measured
constexpr double kCodesPerNs = 32.0;  // bytes per multiprocessor: its share of 4.3 TB/s
constexpr double kXPerNs = 40.0;      // from L2
constexpr double kScalesPerNs = 32.0;
constexpr double kPerSlab = 700.0;  // two barriers and a wait for L2
constexpr double kPerTile = 900.0;  // start and end of a tile
constexpr double kPerReduction = 2000.0;
constexpr double kPartialsPerNs = 2500.0;  // the whole GPU, written and read

// Tiles of a product of dense matrices, and the share of its peak that a multiprocessor reaches
// with them: it works on one at a time, and those of the last round leave the others idle.
struct ProductTile {
  int rows, columns;
  double share;
};
constexpr ProductTile kProductTiles[] = {{128, 256, 1.0}, {128, 128, 0.85}, {64, 64, 0.5}};
constexpr double kFlopsPerNs = 6000.0, kFloatFlopsPerNs = 390.0;  // of a multiprocessor
constexpr double kPerProduct = 5000.0;  // two launches, a start and an end
constexpr double kBytesPerNs = 4300.0;  // of the whole GPU

struct Sizes {
  int chunk, stage, table;
};

Sizes sizes_of(int bits) {
  const auto of = [](auto b) {
    constexpr int kBits = decltype(b)::value;
    return Sizes{Chunk<kBits>::kCodes, Chunk<kBits>::kBytes, kTableBytes<kBits>};
  };
  return bits == 8   ? of(std::integral_constant<int, 8>())
         : bits == 4 ? of(std::integral_constant<int, 4>())
         : bits == 3 ? of(std::integral_constant<int, 3>())
                     : of(std::integral_constant<int, 2>());
}

// Everything in shared memory for slabs of `chunks`; says where it ends.
int64_t place(const Sizes& s, bool shifted, int64_t slab, MmaPlan* plan) {
  const int chunks = static_cast<int>(slab);
  const int segments = chunks * s.chunk / kSegment;
  int at = s.table;
  plan->slab_chunks = chunks;
  plan->rings = at;
  at += plan->warps * kStages * s.stage;
  plan->x = at;
  at += plan->x_columns() * chunks * s.chunk * 2;
  at += std::max(0, 8 * plan->column_tiles - plan->x_columns()) * 64;  // what the last tile reads
  plan->sums = at;                                                     // read two at a time
  at += shifted ? segments * plan->sum_stride() * 4 : 0;
  plan->scales = at;
  at += segments * plan->scale_stride() * 4;
  plan->shifts = at;
  at += shifted ? segments * plan->scale_stride() * 4 : 0;
  // Where the warps' accumulators are added up, once all else is done with.
  const int accumulators = plan->warps * kMmaRows * 8 * plan->column_tiles * 4;
  plan->shared_bytes = (std::max(at, s.table + accumulators) + 15) / 16 * 16;
  return at;
}

double cost_of(const PackedView& w, const Sizes& s, const GpuLimits& gpu, const MmaPlan& plan) {
  const double codes = static_cast<double>(s.chunk) * w.bits / 8.0;  // of a row and chunk
  // Chunks are dealt out to warps: the warp with most of them sets the time.
  const double slice =
      static_cast<double>(ceil_div(plan.slice_chunks, plan.k_warps) * plan.k_warps);
  const double rows = plan.rows_per_tile(), m = static_cast<double>(plan.m);
  const double tile =
      slice * (codes * rows / kCodesPerNs + m * s.chunk * 2.0 / kXPerNs +
               rows * (s.chunk / double{kSegment}) * 4.0 / kScalesPerNs) +
      static_cast<double>(ceil_div(plan.slice_chunks, plan.slab_chunks)) * kPerSlab + kPerTile;
  const double waves =
      static_cast<double>(ceil_div(plan.row_tiles * plan.slices, gpu.multiprocessors));
  const double partials = static_cast<double>(plan.partials(w.rows)) * 8.0;
  return waves * tile + (plan.slices > 1 ? kPerReduction + partials / kPartialsPerNs : 0.0);
}

}  // namespace

bool suits_mma(const PackedView& w) {
  // Rows, and the planes of 3 bits in them, must begin at multiples of 16 bytes.
  const int64_t columns = w.bits == 8 ? 16 : w.bits == 4 ? 32 : w.bits == 2 ? 64 : 128;
  return w.family != Family::kLearnedCodebook && w.outliers.count == 0 && w.cols % columns == 0 &&
         (w.groups == 1 || w.group_size % kSegment == 0);
}

Way choose_way(const PackedView& w, FloatType x, int64_t m, bool floats, bool aligned) {
  if (m == 0) return Way::kNothing;
  if (x != FloatType::kFloat32 && !floats && aligned && m <= kMostRowsOfMma && suits_mma(w))
    return Way::kMma;
  return m <= kMostRowsOfAny ? Way::kAny : Way::kSlabs;
}

namespace {

// The cheapest cut for blocks of plan.warps; false where none fits.
bool search(const PackedView& w, const Sizes& s, const GpuLimits& gpu, MmaPlan plan,
            MmaPlan* best) {
  const bool shifted = is_shifted(w);
  double least = INFINITY;
  for (plan.row_warps = 1; plan.row_warps <= plan.warps; plan.row_warps *= 2) {
    plan.k_warps = plan.warps / plan.row_warps;
    plan.row_tiles = ceil_div(w.rows, plan.rows_per_tile());
    if (plan.row_tiles > kMostTiles) continue;
    for (int slices = 1; slices <= std::min(plan.chunks, 32); ++slices) {
      plan.slice_chunks = static_cast<int>(ceil_div(plan.chunks, slices));
      plan.slices = static_cast<int>(ceil_div(plan.chunks, plan.slice_chunks));
      if (plan.slices != slices) continue;  // the same cut as with fewer
      // The longest slab that fits, in whole turns of the warps that share the columns.
      const int64_t fixed = place(s, shifted, 0, &plan);
      const int64_t turn = place(s, shifted, plan.k_warps, &plan) - fixed;
      if (plan.shared_bytes > gpu.shared_bytes) continue;
      const int64_t turns = std::min<int64_t>((gpu.shared_bytes - fixed - 16) / turn,
                                              ceil_div(plan.slice_chunks, plan.k_warps));
      place(s, shifted, std::max<int64_t>(1, turns) * plan.k_warps, &plan);
      const double cost = cost_of(w, s, gpu, plan);
      if (cost >= least) continue;
      least = cost;
      *best = plan;
    }
  }
  return least < INFINITY;
}

}  // namespace

bool plan_mma(const PackedView& w, int64_t m, const GpuLimits& gpu, MmaPlan* plan) {
  if (w.cols > kMostColumns) return false;
  const Sizes s = sizes_of(w.bits);
  *plan = {};
  plan->m = m;
  while (plan->column_tiles * 8 < m) plan->column_tiles *= 2;
  plan->chunks = static_cast<int>(ceil_div(w.cols, s.chunk));
  // More warps keep more bytes on their way; a block that may have 100 KB has no room for them.
  const int most = gpu.shared_bytes >= 160 * 1024 ? most_mma_warps(plan->column_tiles) : 8;
  for (plan->warps = most; plan->warps >= 1; plan->warps /= 2) {
    if (!search(w, s, gpu, *plan, plan)) continue;
    plan->grid = static_cast<uint32_t>(
        std::min<int64_t>(plan->row_tiles * plan->slices, gpu.multiprocessors));
    return true;
  }
  return false;
}

AnyPlan plan_any(int64_t m, int64_t rows) {
  AnyPlan plan;
  plan.columns = m == 1 ? 1 : 8;
  plan.row_blocks = ceil_div(rows, kAnyWarps * kAnyRows);
  plan.column_blocks = ceil_div(m, plan.columns);
  plan.grid_x = static_cast<uint32_t>(std::min<int64_t>(plan.row_blocks, 0x7fffffff));
  plan.grid_y = static_cast<uint32_t>(std::min<int64_t>(plan.column_blocks, 65535));
  return plan;
}

int64_t mma_pass(int64_t m) { return ceil_div(m, ceil_div(m, kMaxMmaColumns)); }

namespace {

// Nanoseconds for m rows of x by a slab, without what every cut costs alike: decoding the weight.
double slab_cost(int64_t length, int64_t other, int64_t m, FloatType dtype, const GpuLimits& gpu) {
  const double rate = dtype == FloatType::kFloat32 ? kFloatFlopsPerNs : kFlopsPerNs;
  double product = INFINITY;
  for (const ProductTile& tile : kProductTiles) {
    const int64_t tiles = ceil_div(m, tile.rows) * ceil_div(length, tile.columns);
    const double flops = 2.0 * tile.rows * tile.columns * static_cast<double>(other);
    product = std::min(product, static_cast<double>(ceil_div(tiles, gpu.multiprocessors)) * flops /
                                    (rate * tile.share));
  }
  const int64_t bytes = length * other * size_of(dtype);
  const int64_t spilled = 2 * std::max<int64_t>(0, bytes - kKeptBytes);  // written, read again
  return product + static_cast<double>(spilled) / kBytesPerNs + kPerProduct;
}

}  // namespace

int64_t slab_length(int64_t length, int64_t other, int64_t m, FloatType dtype,
                    const GpuLimits& gpu) {
  const int64_t most = kSlabBytes / (std::max<int64_t>(1, other) * size_of(dtype));
  int64_t unit = kSlabUnit, best = 0, slab = 0;
  while (unit > kShortestSlab && unit > most) unit /= 2;
  double least = INFINITY;
  // Every length while they are few, then in steps of a sixteenth.
  for (int64_t units = 1; slab < length; units += 1 + units / 16) {
    slab = std::min(length, units * unit);
    if (best > 0 && slab > most) break;
    const int64_t rest = length % slab;
    const double cost = static_cast<double>(length / slab) * slab_cost(slab, other, m, dtype, gpu) +
                        (rest ? slab_cost(rest, other, m, dtype, gpu) : 0.0);
    if (cost >= least) continue;
    least = cost;
    best = slab;
  }
  return best;
}

}  // namespace bitfold::cuda
