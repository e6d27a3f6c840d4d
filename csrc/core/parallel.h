// Borrowed threads. The caller (torch's pool, or a plain loop in GoogleTest) hands this in; the
// core starts no thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace bitfold {

// body(begin, end) handles the half-open range; ranges may run concurrently and cover [0, n)
// exactly once. It must not throw, unless memory runs out.
using RangeBody = std::function<void(int64_t begin, int64_t end)>;

// run(n, grain, body): splits [0, n) in pieces of at least `grain`.
using Parallel = std::function<void(int64_t n, int64_t grain, const RangeBody& body)>;

// Items that a thread should be given at least, where each takes `work` and starting one is worth
// `least`.
inline int64_t grain(int64_t work, int64_t least) {
  return std::max<int64_t>(1, least / std::max<int64_t>(1, work));
}

inline void run_serially(int64_t n, int64_t /*grain*/, const RangeBody& body) {
  if (n > 0) body(0, n);
}

}  // namespace bitfold
