#include "cuda/emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

namespace emulator {
namespace {

constexpr size_t kStack = 1 << 16;
constexpr uint32_t kMostThreads = 1024, kWarp = 32;

struct Meeting {
  uint32_t arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf here;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  bool done = true;
  Index index{};
};

struct Block {
  Fiber fibers[kMostThreads];
  ucontext_t scheduler;
  jmp_buf scheduler_here;
  uint32_t now = 0, threads = 0, live = 0;
  bool moved = false;  // somebody did something since the last round
  Meeting all, warp[kMostThreads / kWarp];
  uint64_t given[2]
                [kMostThreads];  // by turns, so that no exchange overwrites what the last one reads
  Index block{}, block_dim{}, grid_dim{};
  std::vector<char> shared;
  const std::function<void()>* body = nullptr;
};

Block g;

// swapcontext asks the kernel for signal masks each time; jumps do not, but AddressSanitizer knows
// only the former.
#if defined(__SANITIZE_ADDRESS__)
void yield() { swapcontext(&g.fibers[g.now].context, &g.scheduler); }
void resume(Fiber* fiber) { swapcontext(&g.scheduler, &fiber->context); }
#else
void yield() {
  if (_setjmp(g.fibers[g.now].here) == 0) _longjmp(g.scheduler_here, 1);
}
void resume(Fiber* fiber) {
  if (_setjmp(g.scheduler_here) != 0) return;
  if (fiber->begun) _longjmp(fiber->here, 1);
  fiber->begun = true;
  setcontext(&fiber->context);
}
#endif

void open(Meeting* meeting) {
  meeting->arrived = 0;
  ++meeting->generation;
}

void meet(Meeting* meeting, uint32_t expected) {
  const uint32_t generation = meeting->generation;
  g.moved = true;
  if (++meeting->arrived >= expected) {
    open(meeting);
    return;
  }
  while (meeting->generation == generation) yield();
  g.moved = true;
}

// What a fiber does all its life: a thread of one block after the other.
void start() {
  for (;;) {
    (*g.body)();
    g.fibers[g.now].done = true;
    g.moved = true;
    --g.live;
    if (g.all.arrived > 0 && g.all.arrived >= g.live) open(&g.all);  // who left is not waited for
    yield();
  }
}

void create(Fiber* fiber) {
  fiber->stack = std::make_unique<char[]>(kStack);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, start, 0);
}

void run_block() {
  g.all = {};
  for (Meeting& meeting : g.warp) meeting = {};
  g.live = g.threads;
  for (uint32_t i = 0; i < g.threads; ++i) {
    Fiber& fiber = g.fibers[i];
    if (!fiber.stack) create(&fiber);
    fiber.done = false;
    fiber.index = {i % g.block_dim.x, i / g.block_dim.x};
  }
  while (g.live > 0) {
    g.moved = false;
    for (g.now = 0; g.now < g.threads; ++g.now) {
      if (!g.fibers[g.now].done) resume(&g.fibers[g.now]);
    }
    if (!g.moved) {
      std::fprintf(stderr, "emulator: %u threads wait for each other\n", g.live);
      std::abort();
    }
  }
}

// By kernel, where it was allowed more than every kernel has.
std::map<const void*, size_t>& allowed_bytes() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}

// The limits of every GPU that we are built for, written out here: those in launch.h are tested
// against them.
const char* refusal(const void* kernel, uint32_t grid_x, uint32_t grid_y, uint32_t block_x,
                    uint32_t block_y, size_t shared_bytes) {
  if (grid_x == 0 || grid_y == 0 || block_x == 0 || block_y == 0) return "nothing is launched";
  if (grid_x > 0x7fffffffu) return "a grid is at most 2147483647 blocks wide";
  if (grid_y > 65535) return "a grid is at most 65535 blocks high";
  if (uint64_t{block_x} * block_y > kMostThreads) return "a block has at most 1024 threads";
  const auto allowed = allowed_bytes().find(kernel);
  if (shared_bytes > (allowed == allowed_bytes().end() ? size_t{48} * 1024 : allowed->second))
    return "more shared memory than the kernel was allowed";
  return nullptr;
}

}  // namespace

void allow_shared_memory(const void* kernel, size_t bytes) { allowed_bytes()[kernel] = bytes; }

const char* run(const void* kernel, uint32_t grid_x, uint32_t grid_y, uint32_t block_x,
                uint32_t block_y, size_t shared_bytes, const std::function<void()>& body) {
  if (const char* reason = refusal(kernel, grid_x, grid_y, block_x, block_y, shared_bytes))
    return reason;
  g.threads = block_x * block_y;
  g.shared.assign(shared_bytes, static_cast<char>(0xff));
  g.body = &body;
  g.block_dim = {block_x, block_y};
  g.grid_dim = {grid_x, grid_y};
  for (uint32_t y = 0; y < grid_y; ++y) {
    for (uint32_t x = 0; x < grid_x; ++x) {
      g.block = {x, y};
      run_block();
    }
  }
  return nullptr;
}

const Index& thread_index() { return g.fibers[g.now].index; }
const Index& block_index() { return g.block; }
const Index& block_size() { return g.block_dim; }
const Index& grid_size() { return g.grid_dim; }
void* shared_memory() { return g.shared.data(); }

void meet_block() { meet(&g.all, g.live); }

uint64_t exchange(uint64_t value, unsigned lane_xor) {
  const uint32_t me = g.now, warp = me / kWarp;
  uint64_t* given = g.given[g.warp[warp].generation % 2];
  given[me] = value;
  meet(&g.warp[warp], kWarp);
  return given[warp * kWarp + ((me % kWarp) ^ lane_xor)];
}

}  // namespace emulator
