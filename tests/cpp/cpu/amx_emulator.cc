#include "cpu/amx_emulator.h"

#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "core/float16.h"

// Encodings and operations: Intel 64 and IA-32 Architectures Software Developer's Manual, volumes 1
// (chapter 18) and 2.
namespace bitfold::testing {
namespace {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

struct Tile {
  uint8_t bytes[kMostRows][kMostBytes];
};
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

thread_local Tile tiles[kTiles];
thread_local Config config;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "AMX emulator: %s\n", what);
  std::abort();
}

// A three-byte VEX prefix, opcode, ModR/M and, with memory, SIB and displacement.
struct Instruction {
  int opcode, prefix;  // 0, 1: 66, 2: F3, 3: F2
  int reg, rm, vvvv;   // registers, or tiles
  bool memory;
  uint64_t address, stride;  // base + displacement; index * scale
  int length;
};

uint64_t general_register(const ucontext_t& context, int number) {
  constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(context.uc_mcontext.gregs[kOrder[number]]);
}

bool decode(const ucontext_t& context, Instruction* out) {
  const auto* begin = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
  const uint8_t* at = begin;
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return false;  // VEX, map 0F38
  const int r = at[1] & 0x80 ? 0 : 8, x = at[1] & 0x40 ? 0 : 8, b = at[1] & 0x20 ? 0 : 8;
  out->vvvv = (~at[2] >> 3) & 15;
  out->prefix = at[2] & 3;
  out->opcode = at[3];
  if (at[2] & 0x84) return false;  // W or 256 bits
  const int mod = at[4] >> 6, rm = at[4] & 7;
  out->reg = (at[4] >> 3 & 7) + r;
  out->rm = rm + b;
  out->memory = mod != 3;
  at += 5;
  if (out->memory) {
    int base = rm + b;
    out->stride = 0;
    if (rm == 4) {
      const int sib = *at++, index = (sib >> 3 & 7) + x;
      if (index != 4) out->stride = general_register(context, index) << (sib >> 6);
      base = (sib & 7) + b;
    }
    if (mod == 0 && (base & 7) == 5) {
      if (rm != 5) fail("an address without a base");
      int32_t displacement;
      memcpy(&displacement, at, 4);
      at += 4;
      out->address = reinterpret_cast<uint64_t>(at) + static_cast<uint64_t>(int64_t{displacement});
    } else {
      out->address = general_register(context, base);
      if (mod == 1) out->address += static_cast<uint64_t>(int64_t{static_cast<int8_t>(*at++)});
      if (mod == 2) {
        int32_t displacement;
        memcpy(&displacement, at, 4);
        at += 4;
        out->address += static_cast<uint64_t>(int64_t{displacement});
      }
    }
  }
  out->length = static_cast<int>(at - begin);
  return true;
}

// Tiles beyond the configured shape fault, as they would.
Tile& tile(int number, int* rows, int* row_bytes) {
  if (config.palette != 1) fail("a tile before ldtilecfg, or after tilerelease");
  if (number >= kTiles || config.rows[number] == 0) fail("a tile that is not configured");
  *rows = config.rows[number];
  *row_bytes = config.row_bytes[number];
  return tiles[number];
}

void load_config(const void* from) {
  memcpy(&config, from, sizeof config);
  if (config.palette != 1 || config.start_row != 0) fail("ldtilecfg: not palette 1 from row 0");
  for (int i = 0; i < 16; ++i) {
    const bool used = config.rows[i] != 0;
    if (config.rows[i] > kMostRows || config.row_bytes[i] > kMostBytes ||
        config.row_bytes[i] % 4 != 0 || used != (config.row_bytes[i] != 0) || (used && i >= kTiles))
      fail("ldtilecfg: a shape that does not exist");
  }
  for (uint8_t byte : config.reserved)
    if (byte != 0) fail("ldtilecfg: reserved bytes");
  memset(tiles, 0, sizeof tiles);
}

float bfloat16_of(const uint8_t* bytes) {
  uint16_t bits;
  memcpy(&bits, bytes, 2);
  if ((bits & 0x7f80) == 0) bits &= 0x8000;  // denormal numbers count as zero
  return bfloat16_to_float(bits);
}

float flushed(float v) { return std::fabs(v) < std::numeric_limits<float>::min() ? 0.0f : v; }

void dot_bfloat16(int to, int left, int right) {
  int rows, to_bytes, left_rows, left_bytes, right_rows, right_bytes;
  Tile& sums = tile(to, &rows, &to_bytes);
  const Tile& a = tile(left, &left_rows, &left_bytes);
  const Tile& b = tile(right, &right_rows, &right_bytes);
  if (rows != left_rows || to_bytes != right_bytes || left_bytes / 4 != right_rows)
    fail("tdpbf16ps: shapes do not match");
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < to_bytes / 4; ++n) {
      float even = 0.0f, odd = 0.0f, sum;
      for (int k = 0; k < right_rows; ++k) {
        even += flushed(bfloat16_of(a.bytes[m] + 4 * k) * bfloat16_of(b.bytes[k] + 4 * n));
        odd += flushed(bfloat16_of(a.bytes[m] + 4 * k + 2) * bfloat16_of(b.bytes[k] + 4 * n + 2));
      }
      memcpy(&sum, sums.bytes[m] + 4 * n, 4);
      sum = flushed(sum + (even + odd));
      memcpy(sums.bytes[m] + 4 * n, &sum, 4);
    }
  }
}

// False where it is no instruction of AMX.
bool execute(const Instruction& i) {
  int rows, row_bytes;
  if (i.opcode == 0x49 && i.prefix == 0 && i.memory && i.reg == 0) {
    load_config(reinterpret_cast<const void*>(i.address + i.stride));
  } else if (i.opcode == 0x49 && i.prefix == 0 && !i.memory && i.reg == 0 && i.rm == 0) {
    config = {};
  } else if (i.opcode == 0x4b && i.memory && i.prefix != 0) {  // tileloadd, tileloaddt1, tilestored
    Tile& t = tile(i.reg, &rows, &row_bytes);
    for (int r = 0; r < rows; ++r) {
      auto* line = reinterpret_cast<uint8_t*>(i.address + static_cast<uint64_t>(r) * i.stride);
      if (i.prefix == 2) {
        memcpy(line, t.bytes[r], static_cast<size_t>(row_bytes));
      } else {
        memset(t.bytes[r], 0, kMostBytes);
        memcpy(t.bytes[r], line, static_cast<size_t>(row_bytes));
      }
    }
  } else if (i.opcode == 0x5c && !i.memory && i.prefix == 2) {
    dot_bfloat16(i.reg, i.rm, i.vvvv);
  } else {
    return false;
  }
  return true;
}

void on_illegal_instruction(int number, siginfo_t*, void* raw) {
  auto& context = *static_cast<ucontext_t*>(raw);
  Instruction instruction{};
  if (!decode(context, &instruction) || !execute(instruction)) {
    signal(number, SIG_DFL);  // and again, as it was
    return;
  }
  context.uc_mcontext.gregs[REG_RIP] += instruction.length;
}

}  // namespace

void emulate_amx() {
  struct sigaction action {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGILL, &action, nullptr) != 0) fail("sigaction");
}

}  // namespace bitfold::testing
