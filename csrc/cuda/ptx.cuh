// Instructions that C++ has no words for, one per function; and what they do, for the emulation of
// threads that tests compile kernels with.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/view.h"

namespace bitfold::cuda {

#if defined(__CUDACC__)

// Sixteen bytes into shared memory, not through registers and not kept in L1; zeros where `valid`
// is false, and then nothing is read.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until no more than kPending of this thread's groups are on their way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The block's shared memory, as much as the launch says.
__device__ inline uint8_t* block_memory() {
  extern __shared__ uint4 bitfold_block_memory[];
  return reinterpret_cast<uint8_t*>(bitfold_block_memory);
}

// d = a b + c for tiles of 16x16 and 16x8, operands of kType, accumulators float.
template <FloatType kType>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   float c0, float c1, float c2, float c3) {
  if constexpr (kType == FloatType::kFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2),
          "f"(c3));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2),
          "f"(c3));
  }
}

#else

inline void copy_async(void* shared, const void* global, bool valid) {
  memset(shared, 0, 16);
  if (valid) memcpy(shared, global, 16);
}
inline void commit_copies() {}
template <int kPending>
void wait_for_copies() {}
inline uint8_t* block_memory() { return static_cast<uint8_t*>(emulator::shared_memory()); }

// Every lane gathers the operands of all and computes its four results. The layout is PTX's: groups
// of four lanes have the rows of a (and eight below) and the columns of b, two neighbouring k per
// word.
template <FloatType kType>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float c0,
                 float c1, float c2, float c3) {
  const unsigned lane = threadIdx.x % 32;
  const auto value = [](uint64_t words, int half) {
    const auto bits = static_cast<uint16_t>(words >> (16 * half));
    return kType == FloatType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
  };
  float rows[16][16], columns[16][8];
  for (unsigned other = 0; other < 32; ++other) {
    const unsigned from = lane ^ other, group = from / 4, pair = from % 4 * 2;
    const uint64_t upper = emulator::shuffle(a[0] | uint64_t{a[2]} << 32, other);
    const uint64_t lower = emulator::shuffle(a[1] | uint64_t{a[3]} << 32, other);
    const uint64_t b = emulator::shuffle(b0 | uint64_t{b1} << 32, other);
    for (int i = 0; i < 4; ++i) {
      const unsigned k = pair + static_cast<unsigned>(i % 2 + i / 2 * 8);
      rows[group][k] = value(upper, i);
      rows[group + 8][k] = value(lower, i);
      columns[k][group] = value(b, i);
    }
  }
  const float c[4] = {c0, c1, c2, c3};
  for (unsigned i = 0; i < 4; ++i) {
    d[i] = c[i];
    for (unsigned k = 0; k < 16; ++k)
      d[i] += rows[lane / 4 + i / 2 * 8][k] * columns[k][lane % 4 * 2 + i % 2];
  }
}

#endif

// d += a b.
template <FloatType kType>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  mma_16x8x16<kType>(d, a, b0, b1, d[0], d[1], d[2], d[3]);
}
// d = a b.
template <FloatType kType>
__device__ inline void mma_16x8x16_fresh(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  mma_16x8x16<kType>(d, a, b0, b1, 0.0f, 0.0f, 0.0f, 0.0f);
}

}  // namespace bitfold::cuda
