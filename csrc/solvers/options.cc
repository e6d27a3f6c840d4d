#include "solvers/options.h"

#include <algorithm>
#include <string>

namespace bitfold {

Status check_gptq(const Format& format, const MatrixView& w, int64_t n,
                  const GptqOptions& options) {
  if (format.outliers > 0) {
    return Status::error(StatusCode::kInvalidArgument,
                         format.to_string() + " has outliers; solve for its dense part");
  }
  if (w.rows <= 0 || w.cols <= 0) {
    return Status::error(StatusCode::kInvalidArgument,
                         "weight must have at least one row and one column, got [" +
                             std::to_string(w.rows) + ", " + std::to_string(w.cols) + "]");
  }
  if (n != w.cols) {
    return Status::error(StatusCode::kInvalidArgument,
                         "hessian must be [in, in] = [" + std::to_string(w.cols) + ", " +
                             std::to_string(w.cols) + "], got [" + std::to_string(n) + ", " +
                             std::to_string(n) + "]");
  }
  if (options.dynamic && options.order == ColumnOrder::kDescending) {
    return Status::error(StatusCode::kInvalidArgument,
                         "dynamic scales need the columns of a group one after the other: order "
                         "must be none or groups, not descending");
  }
  return Status::success();
}

std::vector<int64_t> measured_panels(int64_t panels, int64_t measured_rows) {
  constexpr int64_t kRows = 16;
  const int64_t count =
      measured_rows < 0
          ? panels
          : std::min(panels, measured_rows / kRows + (measured_rows % kRows > 0 ? 1 : 0));
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < count; ++i) chosen.push_back(i * panels / count);
  return chosen;
}

Status check_hqq(const Format& format, const HqqOptions& options) {
  if (format.zero != Zero::kFloat || format.grouping == Grouping::kTensor) {
    Format usable{format.code, Grouping::kGroup, 64, Zero::kFloat, format.double_quant};
    if (format.grouping != Grouping::kTensor) {
      usable.grouping = format.grouping;
      usable.group_size = format.group_size;
    }
    const std::string better = usable.is_possible() ? usable.to_string() : "int4-g64-fz";
    return Status::error(StatusCode::kInvalidArgument,
                         "format " + format.to_string() +
                             " has no real zero points of groups or rows to solve for; use " +
                             better + ", or method search");
  }
  const bool fits = options.p > 0.0f && options.p <= 1.0f && options.beta > 0.0f &&
                    options.beta <= 1e6f && options.kappa >= 1.0f && options.kappa <= 2.0f &&
                    options.iterations >= 1 && options.iterations <= 100;
  if (fits) return Status::success();
  return Status::error(StatusCode::kInvalidArgument,
                       "p must be in (0, 1], beta in (0, 1e6], kappa in [1, 2] and iterations in "
                       "[1, 100], got " +
                           std::to_string(options.p) + ", " + std::to_string(options.beta) + ", " +
                           std::to_string(options.kappa) + " and " +
                           std::to_string(options.iterations));
}

Status check_awq_clip(const Format& format, const MatrixView& w) {
  const auto invalid = [](const std::string& message) {
    return Status::error(StatusCode::kInvalidArgument, message);
  };
  if (format.outliers > 0)
    return invalid(format.to_string() + " has outliers; solve for its dense part");
  if (format.grouping == Grouping::kTensor || format.family() == Family::kLearnedCodebook) {
    return invalid("format " + format.to_string() +
                   " has no ranges of groups or rows to clip; fold it by quantize()");
  }
  if (w.rows <= 0 || w.cols <= 0) {
    return invalid("weight must have at least one row and one column, got [" +
                   std::to_string(w.rows) + ", " + std::to_string(w.cols) + "]");
  }
  return Status::success();
}

}  // namespace bitfold
