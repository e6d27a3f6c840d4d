// CUDA's threads on the host, as far as our kernels need them: the .cu files themselves are
// compiled by the C++ compiler and run here, block after block, each thread a fiber that others are
// resumed in the place of at __syncthreads and at shuffles. Indices, grids, synchronisation and
// arithmetic are tested that way; memory models, registers and speed are not. A thread that waits
// for one that has ended is found and ends the test; a launch that CUDA would refuse is refused.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

extern "C" [[noreturn]] void __assert_fail(const char*, const char*, unsigned,
                                           const char*) noexcept;

namespace emulator {

struct Index {
  uint32_t x, y;
};

// Runs body, which calls `kernel`, once for each thread of the grid. Null, or why nothing was run:
// what is launched is larger than CUDA allows.
const char* run(const void* kernel, uint32_t grid_x, uint32_t grid_y, uint32_t block_x,
                uint32_t block_y, size_t shared_bytes, const std::function<void()>& body);

// In the place of cudaFuncSetAttribute: this kernel may have more dynamic shared memory.
void allow_shared_memory(const void* kernel, size_t bytes);

// Of the thread that runs now.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
void* shared_memory();
void meet_block();
uint64_t exchange(uint64_t value, unsigned lane_xor);  // what the lane with that other number gave

template <class T>
T shuffle(T value, unsigned lane_xor) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, lane_xor);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

inline void __syncthreads() { emulator::meet_block(); }
template <class T>
T __shfl_xor_sync(unsigned /*mask*/, T value, int lane_xor, int /*width*/ = 32) {
  return emulator::shuffle(value, static_cast<unsigned>(lane_xor));
}

// lane may be another one for each thread.
template <class T>
T __shfl_sync(unsigned /*mask*/, T value, int lane, int /*width*/ = 32) {
  const unsigned me = threadIdx.y * blockDim.x + threadIdx.x;
  return emulator::shuffle(value, (me % 32) ^ static_cast<unsigned>(lane));
}

inline void __syncwarp() { emulator::exchange(0, 0); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
inline int __clz(int v) { return __builtin_clz(static_cast<unsigned>(v)); }
struct float2 {
  float x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

// One thread runs at a time.
inline unsigned long long atomicMin(unsigned long long* at, unsigned long long value) {
  const unsigned long long old = *at;
  if (value < old) *at = value;
  return old;
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  const unsigned long long old = *at;
  *at += value;
  return old;
}
