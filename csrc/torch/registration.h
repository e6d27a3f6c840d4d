// How a function becomes an op of torch. Whatever is thrown on its way bears the op's name: torch's
// C interface knows neither op nor reason, and says that a call failed in some file and line.
#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <utility>

#include "torch/checks.h"

namespace bitfold::binding {

// A string as a template argument.
template <size_t kSize>
struct OpName {
  char text[kSize];
  consteval OpName(const char (&from)[kSize]) { std::copy_n(from, kSize, text); }
};

template <OpName kName, auto kFunction>
struct Op;

template <OpName kName, class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct Op<kName, kFunction> {
  static Result call(Arguments... arguments) {
    try {
      return kFunction(std::forward<Arguments>(arguments)...);
    } catch (const std::exception& error) {
      throw_as(kName.text, error);
    }
  }
};

// kSaid: the name in messages, where it is another.
template <OpName kName, auto kFunction, OpName kSaid = kName>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl(kName.text, TORCH_BOX((&Op<kSaid, kFunction>::call)));
}

}  // namespace bitfold::binding
