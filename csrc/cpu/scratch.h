// Memory that a call needs while it runs.
#pragma once

#include <cstdint>

namespace bitfold {

// Uninitialized memory that begins with a page: where activations, sums and the stream meet in the
// first cache is then the same in every call (measured: else up to half as slow again). A thread
// keeps the two largest pieces that it used, of up to 32 MiB each, until it ends, for fresh pages
// cost more than filling them: a twentieth of the time of a product of 512 rows.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint8_t* data() const { return piece_.data; }

  struct Piece {
    uint8_t* data = nullptr;
    int64_t bytes = 0;
  };

 private:
  Piece piece_;
};

}  // namespace bitfold
