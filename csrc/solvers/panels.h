// A matrix being rounded, sixteen rows to a panel and one to a lane: what the kernels that choose
// codes column by column work on.
#pragma once

#include <memory>
#include <vector>

#include "core/parallel.h"
#include "core/view.h"
#include "cpu/kernel_table.h"
#include "solvers/scale_storage.h"

namespace bitfold {

inline constexpr int64_t kPanelLanes = kSpanLanes;

struct PanelMatrix {
  PanelMatrix(const KernelTable& kernels, const Format& stored, int64_t out, int64_t in);

  const KernelTable& k;
  const Format& format;
  const Encoding encoding;
  const int64_t rows, cols, panels;
  const int64_t groups, group_size;  // of a row

  // Rows beyond the last are copies of the first of their panel.
  std::unique_ptr<float[]> weights;  // [panels, cols, 16]
  std::unique_ptr<uint8_t[]> codes;  // [panels, cols, 16]
  std::unique_ptr<uint8_t[]> exact;  // [panels, cols, 16] or null (cpu/kernel_table.h)
  std::vector<float> scale, zero;    // [panels, groups, 16]: what a reader decodes
  std::vector<float> books;          // [panels, 3, 16, 16], learned codebooks

  int64_t rows_of(int64_t panel) const {
    return rows - panel * kPanelLanes < kPanelLanes ? rows - panel * kPanelLanes : kPanelLanes;
  }
  int64_t width() const { return panels * kPanelLanes; }
  // Of a panel.
  float* weights_of(int64_t p) const { return weights.get() + p * cols * kPanelLanes; }
  uint8_t* codes_of(int64_t p) const { return codes.get() + p * cols * kPanelLanes; }
  const uint8_t* exact_of(int64_t p) const {
    return exact ? exact.get() + p * cols * kPanelLanes : nullptr;
  }
  float* scale_of(int64_t p) { return scale.data() + p * groups * kPanelLanes; }
  float* zero_of(int64_t p) { return zero.data() + p * groups * kPanelLanes; }
  const float* books_of(int64_t p) const {
    return books.empty() ? nullptr : books.data() + p * 3 * 256;
  }

  // The weights, those of `dead` columns as zeros. Fails on NaN and infinity, naming the place.
  Status read(const MatrixView& w, const std::vector<uint8_t>& dead, const Parallel& parallel);
  // exact [rows, cols].
  void read_exact(const uint8_t* exact_entries, const Parallel& parallel);
  // Codes, scales and levels of a packed weight.
  void read_packed(const PackedView& packed, const Parallel& parallel);
  // Levels alone.
  void read_books(const PackedView& packed);

  // Scales [scale rows, groups] as they are stored, to and from the lanes.
  void spread(const std::vector<float>& scales, const std::vector<float>& zeros);
  void collect(std::vector<float>* scales, std::vector<float>* zeros) const;
  // Writes scales and zero points; those of the lanes become what a reader decodes.
  void store_scales(int exponent, ScaleStorage* storage);
  // Packs the codes.
  void store_codes(ScaleStorage* storage, const Parallel& parallel) const;

  // The unit decodes of the codes in column c of panel p: unit [16].
  void decode(int64_t p, int64_t c, float* unit) const;

  // Rounds panel p without feedback: error [cols, 16], chosen [cols, 16].
  void round(int64_t p, float* error, uint8_t* chosen);
};

}  // namespace bitfold
