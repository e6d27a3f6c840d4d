#include "solvers/awq.h"

#include <numeric>

#include "solvers/calibration.h"

namespace bitfold {
namespace {

using testing::format_of;
using testing::naive_algebra;
using testing::Owned;
using testing::random_hessian;
using testing::random_weights;

const KernelTable& best() {
  Status status;
  return *active_instruction_set(&status)->table;
}

MatrixView view_of(const std::vector<float>& w, int64_t rows, int64_t cols) {
  return {w.data(), FloatType::kFloat32, rows, cols, cols, 1};
}

// A reader and what it points to.
struct Matrix {
  Matrix(const std::string& format, int64_t out, int64_t in, unsigned seed)
      : rows(out),
        cols(in),
        weight(random_weights(out * in, seed, testing::Shape::kGaussian, 0.05f)),
        hessian(random_hessian(in, seed + 1)),
        channel(static_cast<size_t>(in)),
        reader{format_of(format), Method::kSearch, {}, nullptr, nullptr, nullptr, 3 * in + 8} {
    std::iota(channel.begin(), channel.end(), 0);
    for (int64_t c = 0; c < in; ++c)
      magnitude.push_back(0.8f * std::sqrt(hessian[static_cast<size_t>(c * in + c)]));
  }
  AwqReader get() const {
    AwqReader filled = reader;
    filled.weight = view_of(weight, rows, cols);
    filled.hessian = hessian.data();
    filled.channel = channel.data();
    filled.magnitude = magnitude.data();
    return filled;
  }

  int64_t rows, cols;
  std::vector<float> weight, hessian, magnitude;
  std::vector<int64_t> channel;
  AwqReader reader;
};

struct Found {
  std::vector<float> scale;
  AwqScale report;
  Status status;
};

Found search(const std::vector<Matrix>& matrices, int64_t channels, const KernelTable& k,
             const Parallel& parallel = run_serially) {
  std::vector<AwqReader> readers;
  for (const Matrix& matrix : matrices) readers.push_back(matrix.get());
  Found found;
  found.scale.resize(static_cast<size_t>(std::max<int64_t>(0, channels)));
  found.status = awq_scale({k, naive_algebra(), parallel}, readers, channels, found.scale.data(),
                           &found.report);
  return found;
}

// tokens * tr(E H E^T) after rounding with a scale, the long way.
double loss_with(const Matrix& m, const std::vector<double>& scale) {
  std::vector<float> scaled = m.weight;
  const auto by = [&](size_t i) {
    const int64_t channel = m.channel[i % static_cast<size_t>(m.cols)];
    return channel < 0 ? 1.0 : scale[static_cast<size_t>(channel)];
  };
  for (size_t i = 0; i < scaled.size(); ++i) scaled[i] = static_cast<float>(scaled[i] * by(i));
  Owned packed(m.reader.format, m.rows, m.cols);
  EXPECT_TRUE(packed.quantize(best(), m.reader.method, scaled).ok());
  std::vector<float> back = packed.decoded();
  for (size_t i = 0; i < back.size(); ++i) back[i] = static_cast<float>(back[i] / by(i));
  return static_cast<double>(m.reader.tokens) * testing::loss_of(m.weight, back, m.hessian, m.rows);
}

// AWQ's grid in float64, both of its families.
struct Best {
  double alpha = 0.0, before = 0.0, after = 0.0;
  bool by_weight = false;
  std::vector<double> scale;
};
Best by_the_paper(const std::vector<Matrix>& matrices, int64_t channels) {
  std::vector<double> x(static_cast<size_t>(channels)), w(x), tokens(x);
  for (const Matrix& m : matrices) {
    const int64_t size =
        m.reader.format.grouping == Grouping::kGroup ? m.reader.format.group_size : m.cols;
    for (int64_t c = 0; c < m.cols; ++c) {
      if (m.channel[static_cast<size_t>(c)] < 0) continue;
      const auto to = static_cast<size_t>(m.channel[static_cast<size_t>(c)]);
      double share = 0.0;
      for (int64_t r = 0; r < m.rows; ++r) {
        const float* row = m.weight.data() + r * m.cols;
        float largest = 0.0f;
        for (int64_t j = c / size * size; j < std::min(m.cols, (c / size + 1) * size); ++j)
          largest = std::max(largest, std::fabs(row[j]));
        share += std::fabs(double{row[c]}) / largest / static_cast<double>(m.rows);
      }
      const auto count = static_cast<double>(m.reader.tokens);
      x[to] += count * m.magnitude[static_cast<size_t>(c)];
      w[to] += count * share;
      tokens[to] += count;
    }
  }
  double mean = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = tokens[i] > 0 ? x[i] / tokens[i] : 1.0;
    w[i] = std::max(1e-4, tokens[i] > 0 ? w[i] / tokens[i] : 1.0);
    mean += x[i] / static_cast<double>(x.size());
  }
  Best best;
  const auto judge = [&](double alpha, bool by_weight, const std::vector<double>& scale) {
    double loss = 0.0;
    for (const Matrix& m : matrices) loss += loss_with(m, scale);
    if (best.scale.empty()) best = {0.0, loss, loss, false, scale};
    if (loss < best.after) best = {alpha, best.before, loss, by_weight, scale};
  };
  judge(0.0, false, std::vector<double>(x.size(), 1.0));
  for (bool by_weight : {false, true}) {
    for (int i = by_weight ? 0 : 1; i < 20; ++i) {
      std::vector<double> scale(x.size());
      for (size_t c = 0; c < x.size(); ++c) {
        scale[c] = std::pow(std::max(x[c], 1e-4 * mean), i / 20.0);
        if (by_weight) scale[c] /= std::pow(w[c], 1.0 - i / 20.0);
      }
      const auto [least, most] = std::minmax_element(scale.begin(), scale.end());
      const double middle = std::sqrt(*least * *most);
      for (double& v : scale) v /= middle;
      judge(i / 20.0, by_weight, scale);
    }
  }
  return best;
}

void expect_same(const Found& found, const Best& best, const std::string& what) {
  ASSERT_TRUE(found.status.ok()) << found.status.message;
  EXPECT_EQ(found.report.alpha, best.alpha) << what;
  EXPECT_EQ(found.report.by_weight, best.by_weight) << what;
  EXPECT_EQ(found.report.better, best.after < best.before) << what;
  // The decoded weights are divided by the scale in float, there in double.
  EXPECT_NEAR(found.report.before, best.before, 1e-4 * best.before) << what;
  EXPECT_NEAR(found.report.after, best.after, 1e-4 * best.after) << what;
  for (size_t i = 0; i < best.scale.size(); ++i)
    EXPECT_NEAR(found.scale[i], best.scale[i], 1e-5 * best.scale[i]) << what << " " << i;
}

TEST(AwqScale, IsTheBestOfTheGrid) {
  unsigned seed = 1;
  for (const std::string& text : testing::some_formats()) {
    for (const auto& [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{{5, 33}, {16, 70}}) {
      const std::vector<Matrix> one{{text, rows, cols, seed++}};
      expect_same(search(one, cols, best()), by_the_paper(one, cols), text);
    }
  }
}

TEST(AwqScale, OneForAllThatReadTheChannels) {
  std::vector<Matrix> all{{"int4-g32", 12, 64, 50}, {"nf4", 20, 64, 51}, {"int2-g16", 9, 48, 52}};
  all[1].reader.method = Method::kRound;
  for (size_t c = 0; c < 48; ++c)  // three columns of each of sixteen channels, some of none
    all[2].channel[c] = c % 7 == 0 ? -1 : static_cast<int64_t>(c / 3);
  // The last channels are nobody's.
  expect_same(search(all, 70, best()), by_the_paper(all, 70), "three readers");
}

TEST(AwqScale, PanelsOfColumnsTogetherAreTheProduct) {
  const std::vector<Matrix> wide{{"int3-g128", 2, 600, 60}};
  const Found found = search(wide, 600, best());
  ASSERT_TRUE(found.status.ok());
  const double before = loss_with(wide[0], std::vector<double>(600, 1.0));
  const double after = loss_with(wide[0], {found.scale.begin(), found.scale.end()});
  EXPECT_NEAR(found.report.before, before, 1e-4 * before);
  EXPECT_NEAR(found.report.after, after, 1e-4 * after);
}

TEST(AwqScale, SameOnEveryInstructionSetAndThreadCount) {
  for (const char* text :
       {"nf4", "nf4-outliers", "int8-row", "int4-g64-dq", "int2-g64-fz", "kmeans4-row"}) {
    const std::vector<Matrix> one{{text, 7, 97, 70}};
    const Found base = search(one, 97, portable::table);
    ASSERT_TRUE(base.status.ok());
    for (const InstructionSet& isa : instruction_sets()) {
      if (!isa.supported()) continue;
      const Found other = search(one, 97, *isa.table, testing::run_in_threads);
      EXPECT_EQ(other.scale, base.scale) << text << " " << isa.name;
      EXPECT_EQ(other.report.after, base.report.after) << text << " " << isa.name;
    }
  }
}

TEST(AwqScale, NothingToGain) {
  std::vector<Matrix> one{{"int4-g16", 5, 32, 80}};
  std::fill(one[0].hessian.begin(), one[0].hessian.end(), 0.0f);
  std::fill(one[0].magnitude.begin(), one[0].magnitude.end(), 0.0f);
  Found found = search(one, 32, best());
  ASSERT_TRUE(found.status.ok());
  EXPECT_FALSE(found.report.better);
  EXPECT_EQ(found.scale, std::vector<float>(32, 1.0f));
  one[0] = {"int4-g16", 5, 32, 81};
  one[0].reader.tokens = 0;
  EXPECT_FALSE(search(one, 32, best()).report.better);
  for (float huge : {1e38f, 1e-38f}) {  // some candidates overflow
    one[0] = {"int4-g16", 5, 32, 82};
    for (float& v : one[0].weight) v *= huge;
    found = search(one, 32, best());
    ASSERT_TRUE(found.status.ok()) << found.status.message;
    for (float v : found.scale) EXPECT_TRUE(v > 0.0f && std::isfinite(v));
  }
}

TEST(AwqScale, RefusesWhatMakesNoSense) {
  const auto message = [](const auto& change, int64_t channels = 32) {
    std::vector<Matrix> two{{"int4-g16", 4, 32, 90}, {"int4-g16", 4, 32, 91}};
    change(&two[1]);
    return search(two, channels, best()).status.message;
  };
  EXPECT_EQ(message([](Matrix* m) { m->weight[40] = NAN; }),
            "reader 1: weight[1, 8] is NaN; every weight must be finite");
  EXPECT_EQ(message([](Matrix* m) { m->channel[3] = 32; }),
            "reader 1: channel[3] must be -1 or below 32, the number of channels, got 32");
  EXPECT_EQ(message([](Matrix* m) { m->channel[3] = -2; }),
            "reader 1: channel[3] must be -1 or below 32, the number of channels, got -2");
  EXPECT_EQ(message([](Matrix* m) { m->magnitude[2] = INFINITY; }),
            "reader 1: mean_abs[2] must be finite and not negative, got inf");
  EXPECT_NE(message([](Matrix* m) { m->hessian[33] = NAN; }).find("reader 1: hessian[1, 1] is NaN"),
            std::string::npos);
  EXPECT_NE(message([](Matrix* m) { m->reader.tokens = -1; }).find("tokens must be"),
            std::string::npos);
  EXPECT_EQ(message([](Matrix*) {}, 0), "channels must be at least 1, got 0");
  EXPECT_EQ(search({}, 4, best()).status.message,
            "there must be at least one reader of the scaled channels");
}

}  // namespace
}  // namespace bitfold
