#include "cpu/scratch.h"

#include <cstddef>
#include <new>
#include <utility>

namespace bitfold {
namespace {

constexpr std::align_val_t kPage{4096};
constexpr int64_t kMostKept = int64_t{1} << 25;  // of each piece

void release(Scratch::Piece* piece) {
  ::operator delete(piece->data, kPage);
  *piece = {};
}

// As many as a thread uses at once: for the whole call, and for its share of it.
class Kept {
 public:
  ~Kept() {
    for (Scratch::Piece& piece : pieces_) release(&piece);
  }
  // The smallest that is large enough, or nothing.
  Scratch::Piece take(int64_t bytes) {
    Scratch::Piece* best = nullptr;
    for (Scratch::Piece& piece : pieces_)
      if (piece.bytes >= bytes && (!best || piece.bytes < best->bytes)) best = &piece;
    return best ? std::exchange(*best, {}) : Scratch::Piece{};
  }
  // In the place of the smallest, if that is smaller still.
  void keep(Scratch::Piece piece) {
    Scratch::Piece* least = &pieces_[0];
    for (Scratch::Piece& other : pieces_)
      if (other.bytes < least->bytes) least = &other;
    if (piece.bytes <= kMostKept && piece.bytes > least->bytes) std::swap(piece, *least);
    release(&piece);
  }

 private:
  Scratch::Piece pieces_[2];
};

thread_local Kept kept;

}  // namespace

Scratch::Scratch(int64_t bytes) : piece_(kept.take(bytes)) {
  if (!piece_.data)
    piece_ = {static_cast<uint8_t*>(::operator new(static_cast<std::size_t>(bytes), kPage)), bytes};
}
Scratch::~Scratch() { kept.keep(piece_); }

}  // namespace bitfold
