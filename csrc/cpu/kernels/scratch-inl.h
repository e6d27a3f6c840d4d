// Scratch memory of the products, cut into pieces. Who cuts null only counts. Included by each
// target.

class Cutter {
 public:
  explicit Cutter(void* scratch) : begin_(reinterpret_cast<uintptr_t>(scratch)), at_(begin_) {}

  // Whole cache lines, where scratch begins with one.
  uint8_t* bytes(int64_t count) {
    const uintptr_t piece = at_;
    at_ += static_cast<uintptr_t>((count + 63) / 64 * 64);
    return reinterpret_cast<uint8_t*>(piece);
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(4 * count)); }
  int64_t cut() const { return static_cast<int64_t>(at_ - begin_); }

 private:
  uintptr_t begin_, at_;
};
