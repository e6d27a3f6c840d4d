// Products of many activations with panels of a weight: sixteen rows at once, so that the lanes of
// a vector are rows and activations are broadcast. Codes lie so already (Layout::kPanels), or are
// brought into that order, a piece at a time. Included by each target.

constexpr int64_t kPanelVectors = 2;  // of a row that are read at a time

// Scratch of a panel. A vector of codes becomes at most eight of operands.
constexpr int64_t kPanelBytes = 16 * kPanelVectors * 8 * 64;

struct PanelScratch {
  uint8_t *packed, *expanded;
  float *factor, *shift;  // [units][kTileWidth]
  // Where a span is several units (kernels/shares-inl.h):
  float *share, *offset, *step;  // likewise
  uint8_t* shares;               // [units], at the first of a span: whether they may stand for it
  float *factors, *shifts;       // [16][units], before they are transposed
  float* decoded;
};
static inline int64_t cut_panel(const PackedView& w, const Activations& x, void* scratch,
                                PanelScratch* to) {
  Cutter cut(scratch);
  to->packed = cut.bytes(2 * kTilePanels * 16 * kPanelVectors * 64);
  to->expanded = cut.bytes(kTilePanels * kPanelBytes);
  to->factor = cut.floats(unit_floats(x, kTileWidth));
  to->shift = cut.floats(unit_floats(x, kTileWidth));
  const int64_t shared = x.sums_several_units() ? unit_floats(x, kTileWidth) : 0;
  to->share = cut.floats(shared);
  to->offset = cut.floats(shared);
  to->step = cut.floats(shared);
  to->shares = cut.bytes(x.units);
  to->factors = cut.floats(unit_floats(x, 16));
  to->shifts = cut.floats(unit_floats(x, 16));
  to->decoded = cut.floats(decoded_floats(w, 16));
  return cut.cut();
}
static int64_t panel_scratch_bytes(const PackedView& w, const Activations& x) {
  PanelScratch pieces;
  return cut_panel(w, x, nullptr, &pieces);
}

// kTileWidth rows of the weight on their way through the columns.
template <class Codec, class Panel>
class PanelReader {
 public:
  PanelReader(const PackedView& w, const Activations& x, int64_t row, void* scratch)
      : w_(w), x_(x), row_(row), unit_bits_(__builtin_ctzll(static_cast<uint64_t>(x.unit))) {
    OperandRange ranges[kTileWidth];
    for (int64_t i = 0; i < kTileWidth; ++i) {
      rows_[i] = w.codes + row_at(i) * w.row_bytes;
      if (i == 0 || has_own_levels(w)) {
        ranges[i] = codecs_[i].prepare(w, row_at(i));
      } else {
        codecs_[i] = codecs_[0];
        ranges[i] = ranges[0];
      }
    }
    cut_panel(w, x, scratch, &pieces_);
    shifted_ = has_shift<Codec::kBits>(w, ranges[0].offset);
    for (int64_t j = 0; j < kTileWidth; j += 16) load_panel_units(j, ranges + j);
    if constexpr (Panel::kScaled) share_scales();
    // The next panels are asked for into the second cache, byte after byte as they lie: as many as
    // a turn takes, by its first rows of x, a few at a time. (All at once would keep other loads
    // waiting.)
    const int64_t turn = cols() < w.cols ? cols() : w.cols;
    const int64_t vectors = kTileWidth * ((turn + kVectorCols - 1) / kVectorCols);
    const int64_t asking = x.rows < 4 * kTileRows ? x.rows : 4 * kTileRows;
    lines_ = vectors * kVectorBytes / 64;
    lines_per_row_ = asking == 0 ? 0 : (lines_ + asking - 1) / asking;
  }

  // Columns that a turn takes: all of them where nothing has to be brought and no second tile reads
  // them again.
  int64_t cols() const { return in_place() && next_tile(x_.rows) == x_.rows ? w_.cols : kCols; }

  // Takes the codes of the columns [col, col + cols()).
  void read(int64_t col) {
    if constexpr (Panel::kScaled) scaled_ = shares_fit(col);
    if (w_.layout == Layout::kPanels) return take_lying(col);
    if constexpr (!Panel::kPacked) {
      if (has_own_levels(w_)) return take_expanded(col);
    }
    take_brought(col);
  }

  // y[i, 0..kTileWidth) += for rows [m, m + result) of x and the columns that were read.
  int64_t multiply(int64_t col, int64_t m, float* y) const {
    const int64_t first = col >> unit_bits_, slab_bytes = x_.layout->block_bytes;
    const int64_t left = x_.cols - col, rows = next_tile(x_.rows - m);
    const int64_t units = ((left < cols() ? left : cols()) + x_.unit - 1) >> unit_bits_;
    const int64_t span_units = x_.span >> unit_bits_;
    const auto asked = [&](int64_t done) {
      const int64_t lines = done * lines_per_row_;
      return lines < lines_ ? lines : lines_;
    };
    Tile t = {
        .factor = (scaled_ ? pieces_.step : pieces_.factor) + kTileWidth * first,
        .shift = shifted_ && !scaled_ ? pieces_.shift + kTileWidth * first : nullptr,
        .x = x_.data + (col / 64 * x_.rows + m) * slab_bytes,
        .x_stride = x_.rows * slab_bytes,
        .scale = x_.scale + m * x_.units + first,
        .sum = x_.sum + m * x_.units + first,
        .x_units = x_.units,
        .units = units,
        .span_units = span_units,
        .unit = x_.unit,
        .y = y + kTileWidth * m,
        .ahead = w_.codes + (row_ + kTileWidth) * w_.row_bytes +
                 kTileWidth * (col / kVectorCols * kVectorBytes) + 64 * asked(m),
        .lines = asked(m + rows) - asked(m),
        .lanes = {},
        .thirds = {},
        .lane_stride = in_place() ? 64 : Panel::kPlaced,
    };
    for (int j = 0; j < kTilePanels; ++j) {
      t.lanes[j] = lanes_[j];
      t.thirds[j] = thirds_[j];
    }
    if constexpr (Panel::kScaled) {
      if (!scaled_) {
        multiply_next_tile(ExpandedPanel<Codec>{{codecs_[0]}}, t, rows);
        return rows;
      }
    }
    multiply_next_tile(Panel{{codecs_[0]}}, t, rows);
    return rows;
  }

 private:
  static constexpr int64_t kVectorBytes = Codec::kBits == 3 ? 96 : 64;
  static constexpr int64_t kVectorCols = 16 * kColsPerLane<Codec::kBits>;
  static constexpr int64_t kCols = kPanelVectors * kVectorCols;  // of a turn: whole spans
  static constexpr int64_t kThirds = 16 * kPanelVectors * kTilePanels * 64;  // behind packed lanes

  bool in_place() const { return Panel::kPacked && w_.layout == Layout::kPanels; }
  // Row i of these, or the weight's last.
  int64_t row_at(int64_t i) const { return row_ + i < w_.rows ? row_ + i : w_.rows - 1; }

  // Codes that are lanes as they lie.
  void take_lying(int64_t col) {
    const int64_t lane = col / kColsPerLane<Codec::kBits>;
    for (int j = 0; j < kTilePanels; ++j) {
      const uint8_t* panel = w_.codes + row_at(16 * j) / 16 * 16 * w_.row_bytes;
      lanes_[j] = panel + 64 * lane;
      thirds_[j] = panel + 16 * w_.plane_bytes + 32 * lane;
      if constexpr (!Panel::kPacked) expand_from<PackedPanel<Codec, false>>(col, j, 64);
    }
  }
  // Codes that become lanes first.
  void take_brought(int64_t col) {
    using Brought = PackedPanel<Codec, Codec::kBits == 3>;
    bring<Brought>(col, pieces_.packed);
    for (int j = 0; j < kTilePanels; ++j) {
      lanes_[j] = pieces_.packed + j * Brought::kLaneBytes;
      thirds_[j] = lanes_[j] + kThirds;
      if constexpr (!Panel::kPacked) expand_from<Brought>(col, j, Brought::kPlaced);
    }
  }
  // Codes of which each row's mean something else: expanded before they become lanes.
  void take_expanded(int64_t col) {
    bring<ExpandedPanel<Codec>>(col, pieces_.expanded);
    for (int j = 0; j < kTilePanels; ++j) {
      lanes_[j] = pieces_.expanded + j * Panel::kLaneBytes;
      if (scaled_) expand_from<ExpandedPanel<Codec>>(col, j, Panel::kPlaced);
    }
  }

  // Turns rows into lanes.
  template <class To>
  void bring(int64_t col, uint8_t* place) const {
    const int64_t whole = whole_vectors<Codec>(w_);
    const int64_t blocks = (w_.cols + kVectorCols - 1) / kVectorCols;
    const int64_t first = col / kVectorCols;
    const int64_t end = first + kPanelVectors < blocks ? first + kPanelVectors : blocks;
    for (int64_t b = first; b < end; ++b) {
      // What the next turn takes is asked for into the first cache. It need not exist.
      const int64_t near = b + kPanelVectors < blocks
                               ? 64 * (b + kPanelVectors)
                               : kTileWidth * w_.row_bytes + 64 * (b + kPanelVectors - blocks);
      const int64_t near_bits =
          near < w_.row_bytes ? near / 2
                              : kTileWidth * w_.row_bytes + (near - kTileWidth * w_.row_bytes) / 2;
      for (int j = 0; j < kTilePanels; ++j) {
        const uint8_t* const* rows = rows_ + 16 * j;
        uint8_t* to = place + j * To::kLaneBytes + (b - first) * 16 * To::kPlaced;
        if (b < whole) {
          const auto load = [&](int i) {
            prefetch(rows[i] + near);
            if (Codec::kBits == 3 && b % 2 == 0) prefetch(rows[i] + w_.plane_bytes + near_bits);
            return load_stored<Codec>(w_, rows[i], b);
          };
          To::place(load, codecs_ + 16 * j, to, to + kThirds);
        } else {
          const auto load = [&](int i) { return load_stored_tail<Codec>(w_, rows[i], b); };
          To::place(load, codecs_ + 16 * j, to, to + kThirds);
        }
      }
    }
  }

  // Makes of a panel's lanes, so many bytes apart, what tiles multiply; they may lie there already.
  template <class From>
  void expand_from(int64_t col, int j, int64_t stride) {
    uint8_t* to = pieces_.expanded + j * Panel::kLaneBytes;
    if (Panel::kScaled && scaled_) {
      expand<From, true>(col, j, stride, to);
    } else {
      expand<From, false>(col, j, stride, to);
    }
    lanes_[j] = to;
  }
  template <class From, bool kShared>
  void expand(int64_t col, int j, int64_t stride, uint8_t* to) const {
    const From from{{codecs_[16 * j]}};
    const int up = share_bits<Codec::kBits>(w_);
    const int64_t left = (w_.cols + 63) / 64 * 64 - col;  // whole slabs
    const int64_t lanes = (left < kCols ? left : kCols) / kColsPerLane<Codec::kBits>;
    const int64_t lanes_of_unit = x_.unit / kColsPerLane<Codec::kBits>;
    int64_t lane = 0;
    for (int64_t unit = col >> unit_bits_; lane < lanes; ++unit) {
      I share, offset;
      if constexpr (kShared) {
        share = load_i(pieces_.share + unit * kTileWidth + 16 * j);
        offset = load_i(pieces_.offset + unit * kTileWidth + 16 * j);
      }
      for (const int64_t end = lane + lanes_of_unit; lane < end; ++lane) {
        const uint8_t* at = lanes_[j] + lane * stride;
        const Stored codes = from.load(lanes_[j], thirds_[j], lane * stride);
#pragma GCC unroll 8
        for (int p = 0; p < Codec::kParts; ++p) {
          I operand = from.part(at, codes, p);
          if constexpr (kShared) {
            operand = add_16(scale_16(shift_left_16(operand, up), share), offset);
          }
          store_i(to + lane * Panel::kPlaced + 64 * p, operand);
        }
      }
    }
  }

  // Units of spans that have one scale are brought to it where that can be.
  void share_scales() {
    const int64_t per_span = x_.span >> unit_bits_;
    for (int64_t u = 0; u < x_.units; u += per_span) {
      bool fits = x_.shared[u];
      for (int64_t at = u * kTileWidth; at < (u + 1) * kTileWidth; at += 16) {
        fits &= share_span<Codec::kBits>(
            w_, per_span, pieces_.factor + at, shifted_ ? pieces_.shift + at : nullptr,
            pieces_.share + at, pieces_.offset + at, pieces_.step + at);
      }
      pieces_.shares[u] = fits;
    }
  }
  // Whether all spans of the turn from `col` have their shares.
  bool shares_fit(int64_t col) const {
    const int64_t end = (col + kCols < x_.cols ? col + kCols : x_.cols);
    for (int64_t at = col; at < end; at += x_.span)
      if (!pieces_.shares[at >> unit_bits_]) return false;
    return true;
  }

  // Factors and shifts of sixteen rows from row_ + j: [units][kTileWidth], from column j.
  void load_panel_units(int64_t j, const OperandRange* ranges) {
    const int64_t units = x_.units, left = w_.rows - row_ - j;
    const int64_t n = left < 1 ? 1 : left < 16 ? left : 16;  // rows that do not exist repeat others
    load_units<Codec::kBits>(w_, row_at(j), n, x_.unit, units, ranges, pieces_.decoded,
                             pieces_.factors, shifted_ ? pieces_.shifts : nullptr);
    ask_for_units(w_, row_ + kTileWidth + j, 16);
    const auto transpose_to = [&](const float* from, float* to) {
      for (int64_t u = 0; u < units; u += 16) {
        I block[16];
        for (int64_t i = 0; i < 16; ++i) block[i] = load_i(from + (i < n ? i : 0) * units + u);
        transpose(block);
        for (int i = 0; i < 16; ++i) store_i(to + (u + i) * kTileWidth + j, block[i]);
      }
    };
    transpose_to(pieces_.factors, pieces_.factor);
    if (shifted_) transpose_to(pieces_.shifts, pieces_.shift);
  }

  const PackedView& w_;
  const Activations& x_;
  const int64_t row_;
  const int unit_bits_;  // log2 of x.unit: tiles are too short for divisions
  bool scaled_ = false;  // of this turn: words were expanded with their shares
  int64_t lines_, lines_per_row_;
  Codec codecs_[kTileWidth];
  const uint8_t* rows_[kTileWidth];
  PanelScratch pieces_;
  bool shifted_;
  const uint8_t *lanes_[kTilePanels] = {}, *thirds_[kTilePanels] = {};
};

template <class Codec, class Panel>
static void multiply_panel_as(const PackedView& w, const Activations& x, int64_t row, void* scratch,
                              float* y) {
  PanelReader<Codec, Panel> panel(w, x, row, scratch);
  for (int64_t col = 0; col < w.cols; col += panel.cols()) {
    panel.read(col);
    for (int64_t m = 0; m < x.rows;) m += panel.multiply(col, m, y);
  }
}

template <class Codec>
static void multiply_panel_with(const PackedView& w, const Activations& x, int64_t row,
                                void* scratch, float* y) {
  if constexpr (Codec::kWords) {
    if (x.sums_several_units())
      return multiply_panel_as<Codec, ScaledPanel<Codec>>(w, x, row, scratch, y);
  }
  if (has_own_levels(w) || (kExpandingCosts && x.rows > kTileRows))
    return multiply_panel_as<Codec, ExpandedPanel<Codec>>(w, x, row, scratch, y);
  if (w.layout == Layout::kPanels)
    return multiply_panel_as<Codec, PackedPanel<Codec, false>>(w, x, row, scratch, y);
  multiply_panel_as<Codec, PackedPanel<Codec, Codec::kBits == 3>>(w, x, row, scratch, y);
}
