#include "solvers/gptq.h"

#include <numeric>

#include "solvers/calibration.h"
#include "solvers/panel_scales.h"

namespace bitfold {
namespace {

using testing::format_of;
using testing::loss_of;
using testing::naive_algebra;
using testing::Owned;
using testing::random_hessian;
using testing::random_weights;
using testing::solve;
using testing::Solved;

const KernelTable& best() {
  Status status;
  return *active_instruction_set(&status)->table;
}

constexpr ColumnOrder kOrders[] = {ColumnOrder::kGiven, ColumnOrder::kDescending,
                                   ColumnOrder::kGroups};

GptqOptions options_of(ColumnOrder order, int sweeps = 0, int refits = 0) {
  GptqOptions options;
  options.order = order;
  options.sweeps = sweeps;
  options.refits = refits;
  return options;
}

double added_by(double lambda, const std::vector<float>& hessian, int64_t n) {
  double sum = 0.0;
  int64_t alive = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double own = hessian[static_cast<size_t>(i * n + i)];
    sum += own;
    alive += own != 0.0;
  }
  return lambda * sum / static_cast<double>(alive);
}

// GPTQ as it was published, in double precision: Cholesky, inverse, Cholesky, one column after the
// other. Integer grids whose scales are those that `packed` stores. Returns the codes.
std::vector<int> published(const std::vector<float>& weights, const std::vector<float>& hessian,
                           int64_t rows, double added, const std::vector<int32_t>& order,
                           const PackedView& packed) {
  const auto n = static_cast<int64_t>(order.size());
  const auto at = [&](int64_t i, int64_t j) { return static_cast<size_t>(i * n + j); };
  std::vector<double> h(hessian.size()), inverse(h.size()), w(weights.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j)
      h[at(i, j)] = hessian[at(order[static_cast<size_t>(i)], order[static_cast<size_t>(j)])];
    h[at(i, i)] += added;
  }
  // Inverse through the factor: one column of the identity at a time.
  EXPECT_TRUE(testing::naive_cholesky(n, h.data()));
  for (int64_t c = 0; c < n; ++c) {
    std::vector<double> v(static_cast<size_t>(n));
    v[static_cast<size_t>(c)] = 1.0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t p = 0; p < i; ++p)
        v[static_cast<size_t>(i)] -= h[at(i, p)] * v[static_cast<size_t>(p)];
      v[static_cast<size_t>(i)] /= h[at(i, i)];
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t p = i + 1; p < n; ++p)
        v[static_cast<size_t>(i)] -= h[at(p, i)] * v[static_cast<size_t>(p)];
      v[static_cast<size_t>(i)] /= h[at(i, i)];
    }
    for (int64_t i = 0; i < n; ++i) inverse[at(i, c)] = v[static_cast<size_t>(i)];
  }
  EXPECT_TRUE(testing::naive_cholesky(n, inverse.data()));  // lower: U transposed
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) w[at(r, i)] = weights[at(r, order[static_cast<size_t>(i)])];
  }
  std::vector<int> codes(w.size());
  const double top = (1 << packed.bits) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t column = order[static_cast<size_t>(i)], group = column / packed.group_size;
    for (int64_t r = 0; r < rows; ++r) {
      const double scale = scale_of(packed, r, group), zero = zero_of(packed, r, group);
      const double code = std::clamp(std::nearbyint(w[at(r, i)] / scale + zero), 0.0, top);
      codes[at(r, column)] = static_cast<int>(code);
      const double error = (w[at(r, i)] - (code - zero) * scale) / inverse[at(i, i)];
      for (int64_t j = i; j < n; ++j) w[at(r, j)] -= error * inverse[at(j, i)];
    }
  }
  return codes;
}

TEST(Gptq, CodesAreThoseOfThePublishedAlgorithm) {
  const int64_t rows = 21, n = 301;  // blocks, sections and panels all ragged
  const std::vector<float> w = random_weights(rows * n, 41), h = random_hessian(n, 42);
  std::vector<double> diagonal;
  for (int64_t i = 0; i < n; ++i) diagonal.push_back(h[static_cast<size_t>(i * n + i)]);
  for (const char* text : {"int4-g64", "int3-g48-sym", "int2-g64", "int4-g16-fz", "int8-row"}) {
    const Format format = format_of(text);
    for (ColumnOrder order : kOrders) {
      Owned packed(format, rows, n);
      std::vector<void*> buffers;
      for (size_t i = 0; i < format.buffers(rows, n).size(); ++i)
        buffers.push_back(packed.pointer(i));
      GptqReport report;
      GptqOptions options = options_of(order);
      ASSERT_TRUE(gptq_quantize({best(), naive_algebra(), run_serially}, format,
                                {w.data(), FloatType::kFloat32, rows, n, n, 1},
                                {h.data(), false, n}, options, buffers.data(), &report)
                      .ok());
      const int64_t size = format.grouping == Grouping::kGroup ? format.group_size : n;
      const double added = added_by(options.damping, h, n);
      const std::vector<int> codes =
          published(w, h, rows, added, order_columns(order, diagonal, size), packed.view());
      std::vector<float> decoded(w.size());
      int64_t flips = 0;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
          const int code = codes[static_cast<size_t>(r * n + i)];
          const PackedView view = packed.view();
          flips += code !=
                   static_cast<int>(extract_code(view.codes + r * view.row_bytes, n, view.bits, i));
          decoded[static_cast<size_t>(r * n + i)] =
              (static_cast<float>(code) - zero_of(view, r, i / size)) * scale_of(view, r, i / size);
        }
      }
      // A tie that falls the other way changes what comes after it in its row; the loss hardly.
      EXPECT_LE(flips, rows * n / 100) << text << " order " << int(order);
      const double loss = loss_of(w, decoded, h, rows, added);
      EXPECT_NEAR(loss_of(w, packed.decoded(), h, rows, added), loss, 1e-3 * loss) << text;
    }
  }
}

TEST(Gptq, TheLossAddedUpIsTheLoss) {
  const int64_t rows = 19, n = 197;
  const std::vector<float> w = random_weights(rows * n, 43, testing::Shape::kOutliers, 0.02f);
  const std::vector<float> h = random_hessian(n, 44);
  for (const std::string& text : testing::dense_formats(testing::some_formats())) {
    for (ColumnOrder order : kOrders) {
      const Solved solved = solve(text, w, h, rows, options_of(order), best());
      const GptqReport& r = solved.report;
      const double damped = loss_of(w, solved.decoded, h, rows, added_by(r.damping, h, n));
      const std::string where = text + " order " + std::to_string(int(order));
      EXPECT_NEAR(r.feedback, damped, 1e-3 * damped) << where;
      EXPECT_NEAR(r.damped, damped, 1e-3 * damped) << where;
      EXPECT_NEAR(r.measured, r.tracked, 1e-3 * damped) << where;
      EXPECT_NEAR(r.loss, loss_of(w, solved.decoded, h, rows), 1e-3 * damped) << where;
      EXPECT_LT(r.feedback, r.plain_damped) << where;
      EXPECT_EQ(r.measured_rows, rows);
      EXPECT_EQ(r.fallback, 0.0);
    }
  }
}

// Blocks of one group, several blocks of one group, a short group in front.
TEST(Gptq, DynamicScalesInBlocksOfTheirGroups) {
  const int64_t rows = 5, n = 390;
  const std::vector<float> w = random_weights(rows * n, 45), h = random_hessian(n, 46);
  for (const char* text :
       {"int4-g16", "int4-g48-fz", "nf4", "int3-g128-dq", "int4-g192", "nf3-g256"}) {
    for (ColumnOrder order : {ColumnOrder::kGiven, ColumnOrder::kGroups}) {
      GptqOptions options = options_of(order, 1, 1);
      options.dynamic = true;
      const Solved solved = solve(text, w, h, rows, options, best());
      const double damped = loss_of(w, solved.decoded, h, rows, added_by(0.01, h, n));
      EXPECT_NEAR(solved.report.damped, damped, 1e-3 * damped) << text;
      EXPECT_LT(damped, solved.report.plain_damped) << text;
    }
  }
  GptqOptions options = options_of(ColumnOrder::kDescending);
  options.dynamic = true;
  EXPECT_FALSE(solve("int4-g64", w, h, rows, options, best()).status.ok());
}

TEST(Gptq, SweepsAndRefitsOnlyLowerTheLoss) {
  const int64_t rows = 17, n = 150;
  const std::vector<float> w = random_weights(rows * n, 47), h = random_hessian(n, 48);
  for (const std::string& text : testing::dense_formats(testing::some_formats())) {
    double before = INFINITY;
    for (const auto& [sweeps, refits] : {std::pair{0, 0}, {1, 0}, {3, 0}, {3, 1}, {3, 3}}) {
      const Solved solved =
          solve(text, w, h, rows, options_of(ColumnOrder::kDescending, sweeps, refits), best());
      const GptqReport& r = solved.report;
      EXPECT_LE(r.damped, before * (1 + 1e-6)) << text << " " << sweeps << " " << refits;
      EXPECT_LE(r.damped, r.feedback * (1 + 1e-6)) << text;
      EXPECT_NEAR(r.measured, r.damped, 1e-3 * r.damped) << text;
      const double damped = loss_of(w, solved.decoded, h, rows, added_by(0.01, h, n));
      EXPECT_NEAR(r.damped, damped, 1e-3 * damped) << text << ": what is stored";
      before = r.damped;
    }
  }
}

TEST(Gptq, RefitAloneKeepsCodes) {
  const int64_t rows = 9, n = 100;
  const std::vector<float> w = random_weights(rows * n, 49), h = random_hessian(n, 50);
  for (const std::string& text : testing::dense_formats(testing::some_formats())) {
    const Format format = format_of(text);
    Owned packed(format, rows, n);
    ASSERT_TRUE(packed.quantize(best(), Method::kSearch, w).ok());
    const auto codes = packed.bytes()[0];
    const double rounded = loss_of(w, packed.decoded(), h, rows, added_by(0.01, h, n));
    std::vector<void*> buffers;
    for (size_t i = 0; i < format.buffers(rows, n).size(); ++i)
      buffers.push_back(packed.pointer(i));
    double before, after;
    ASSERT_TRUE(refit_packed({best(), naive_algebra(), testing::run_in_threads}, format,
                             {w.data(), FloatType::kFloat32, rows, n, n, 1}, {h.data(), false, n},
                             0.01, 2, buffers.data(), &before, &after)
                    .ok());
    EXPECT_EQ(packed.bytes()[0], codes) << text;
    EXPECT_NEAR(before, rounded, 1e-3 * rounded) << text;
    const double refitted = loss_of(w, packed.decoded(), h, rows, added_by(0.01, h, n));
    EXPECT_NEAR(after, refitted, 1e-3 * refitted) << text;
    EXPECT_LE(after, before) << text;
    if (format.family() != Family::kLearnedCodebook && format.grouping == Grouping::kGroup &&
        !format.double_quant && format.bits() < 8) {
      EXPECT_LT(after, 0.99 * before) << text << ": there is something to gain";
    }
  }
}

TEST(Gptq, DeadInputsGetNoWeight) {
  const int64_t rows = 3, n = 40;
  const std::vector<float> w = random_weights(rows * n, 51), h = random_hessian(n, 52, {0, 17, 39});
  const Solved solved =
      solve("int4-g16", w, h, rows, options_of(ColumnOrder::kDescending, 1, 1), best());
  EXPECT_EQ(solved.report.dead, 3.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i : {0, 17, 39}) EXPECT_EQ(solved.decoded[static_cast<size_t>(r * n + i)], 0.0f);
  }
  EXPECT_NEAR(solved.report.loss, loss_of(w, solved.decoded, h, rows), 1e-3 * solved.report.loss);
}

TEST(Gptq, TheLadderOfDamping) {
  const int64_t rows = 3, n = 24;
  const std::vector<float> w = random_weights(rows * n, 53);
  // Rank 1, without damping: singular. A negative eigenvalue that some damping outweighs. One that
  // none does.
  for (const auto& [negative, fallback] : {std::pair{0.0f, false}, {0.05f, false}, {5.0f, true}}) {
    std::vector<float> h(static_cast<size_t>(n * n), 1.0f);
    for (int64_t i = 0; i < n; ++i) h[static_cast<size_t>(i * n + i)] = 1.0f;
    h[1] -= negative, h[static_cast<size_t>(n)] -= negative;
    GptqOptions options = options_of(ColumnOrder::kGiven);
    options.damping = 0.0;
    const Solved solved = solve("int4-g16", w, h, rows, options, best());
    ASSERT_TRUE(solved.status.ok());
    EXPECT_EQ(solved.report.fallback, fallback ? 1.0 : 0.0) << negative;
    if (fallback) {
      EXPECT_EQ(solved.report.damping, kMostDamping);
    } else {
      EXPECT_GT(solved.report.damping, 0.0);
      EXPECT_LE(solved.report.damping, kMostDamping);
    }
    EXPECT_LT(testing::squared_error(w, solved.decoded), static_cast<double>(rows * n));
  }
}

TEST(Gptq, Float64WhereFloat32IsNotEnough) {
  const int64_t rows = 2, n = 16;
  const std::vector<float> w = random_weights(rows * n, 54);
  std::vector<double> h(static_cast<size_t>(n * n), 1.0);
  for (int64_t i = 0; i < n; ++i) h[static_cast<size_t>(i * n + i)] += 1e-9;
  const Format format = format_of("int4-g16");
  Owned packed(format, rows, n);
  std::vector<void*> buffers;
  for (size_t i = 0; i < format.buffers(rows, n).size(); ++i) buffers.push_back(packed.pointer(i));
  GptqOptions options;
  options.damping = 0.0;
  GptqReport report;
  ASSERT_TRUE(gptq_quantize({best(), naive_algebra(), run_serially}, format,
                            {w.data(), FloatType::kFloat32, rows, n, n, 1}, {h.data(), true, n},
                            options, buffers.data(), &report)
                  .ok());
  EXPECT_EQ(report.fp64, 1.0);
  EXPECT_EQ(report.damping, 0.0);
}

TEST(Gptq, WhatIsNotFiniteIsNamed) {
  const int64_t rows = 18, n = 20;
  std::vector<float> w = random_weights(rows * n, 55), h = random_hessian(n, 56);
  w[static_cast<size_t>(17 * n + 3)] = NAN;
  EXPECT_NE(solve("nf4", w, h, rows, {}, best()).status.message.find("weight[17, 3] is NaN"),
            std::string::npos);
  w[static_cast<size_t>(17 * n + 3)] = 0.0f;
  h[static_cast<size_t>(7 * n + 2)] = INFINITY;
  EXPECT_NE(solve("nf4", w, h, rows, {}, best()).status.message.find("hessian[7, 2] is infinite"),
            std::string::npos);
}

// Inputs of the float model that differ by 0.3 of each one's neighbour: cross = 0.3 P H.
TEST(Gptq, TheTargetMovesToTheLeastSquaresAnswer) {
  const int64_t rows = 4, n = 32;
  const std::vector<float> w = random_weights(rows * n, 57), h = random_hessian(n, 58);
  std::vector<float> cross(h.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j)
      cross[static_cast<size_t>(i * n + j)] = 0.3f * h[static_cast<size_t>((i + 1) % n * n + j)];
  }
  GptqOptions options = options_of(ColumnOrder::kDescending);
  options.damping = 1e-4;
  options.cross = cross.data();
  const Solved solved = solve("int8-g16", w, h, rows, options, best());
  // Q H = W (H + C) at the least-squares answer, up to damping and rounding.
  double off = 0.0, size = 0.0, before = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < n; ++j) {
      double left = 0.0, right = 0.0, was = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<size_t>(i * n + j);
        left += static_cast<double>(solved.decoded[static_cast<size_t>(r * n + i)]) * h[at];
        was += static_cast<double>(w[static_cast<size_t>(r * n + i)]) * h[at];
        right += static_cast<double>(w[static_cast<size_t>(r * n + i)]) * (h[at] + cross[at]);
      }
      off += (left - right) * (left - right);
      before += (was - right) * (was - right);
      size += right * right;
    }
  }
  EXPECT_LT(off, 0.05 * before);
  EXPECT_LT(off, 1e-3 * size);
}

TEST(Gptq, ExactEntriesPassOnNoError) {
  const int64_t rows = 18, n = 70;
  std::vector<float> w = random_weights(rows * n, 60);
  const std::vector<float> h = random_hessian(n, 61);
  std::vector<uint8_t> exact(w.size());
  for (size_t i = 5; i < w.size(); i += 31) {
    exact[i] = 1;
    w[i] *= 50.0f;  // would spoil the scale of its group
  }
  for (const char* text : {"int4-g16", "nf4", "int4-g16-fz", "int4-tensor"}) {
    GptqOptions options = options_of(ColumnOrder::kDescending, 2, 1);
    options.exact = exact.data();
    Solved solved = solve(text, w, h, rows, options, best());
    for (size_t i = 0; i < w.size(); ++i) {
      if (exact[i]) solved.decoded[i] = w[i];
    }
    const double damped = loss_of(w, solved.decoded, h, rows, added_by(0.01, h, n));
    EXPECT_NEAR(solved.report.damped, damped, 1e-3 * damped) << text;
    const Solved spoilt =
        solve(text, w, h, rows, options_of(ColumnOrder::kDescending, 2, 1), best());
    EXPECT_LT(damped, 0.5 * spoilt.report.damped) << text;
  }
}

// The same algebra: the same bits, whatever the threads and the instruction set.
TEST(Gptq, ThreadsAndInstructionSetsChangeNothing) {
  const int64_t rows = 37, n = 150;
  const std::vector<float> w = random_weights(rows * n, 62), h = random_hessian(n, 63);
  for (const std::string& text : testing::dense_formats(testing::some_formats())) {
    const GptqOptions options = options_of(ColumnOrder::kDescending, 1, 1);
    const Solved base = solve(text, w, h, rows, options, portable::table);
    for (const InstructionSet& isa : instruction_sets()) {
      if (!isa.supported()) continue;
      EXPECT_EQ(solve(text, w, h, rows, options, *isa.table, testing::run_in_threads).bytes,
                base.bytes)
          << text << " " << isa.name;
    }
  }
}

TEST(Gptq, EveryFormatAndShape) {
  for (const std::string& text : testing::dense_formats(testing::every_format())) {
    for (const auto& [rows, n] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 17}, {17, 53}}) {
      const std::vector<float> w = random_weights(rows * n, 64), h = random_hessian(n, 65);
      const Solved solved = solve(text, w, h, rows, options_of(ColumnOrder::kGroups, 1, 1), best());
      ASSERT_TRUE(solved.status.ok()) << text;
      const double damped = loss_of(w, solved.decoded, h, rows, added_by(0.01, h, n));
      EXPECT_NEAR(solved.report.damped, damped, 1e-3 * damped + 1e-12) << text << " " << n;
      EXPECT_LE(damped, solved.report.plain_damped * 1.001 + 1e-12) << text << " " << n;
    }
  }
}

}  // namespace
}  // namespace bitfold
