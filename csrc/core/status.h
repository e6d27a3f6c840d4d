// How core, cpu and solvers report failure: a code and a sentence. Nothing throws across a library
// border; csrc/torch and csrc/python turn a Status into the exception of their world.
#pragma once

#include <string>
#include <utility>

namespace bitfold {

enum class StatusCode {
  kOk,
  kInvalidFormat,    // a format string or combination that does not exist
  kInvalidArgument,  // shapes, dtypes, sizes that do not fit together
  kNonFinite,        // NaN or infinity in a weight
};

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  bool ok() const { return code == StatusCode::kOk; }
  static Status success() { return {}; }
  static Status error(StatusCode code, std::string message) { return {code, std::move(message)}; }
};

}  // namespace bitfold
