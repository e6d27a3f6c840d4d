#include "cpu/isa.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

namespace bitfold {

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// The builtins ask CPUID and, through XGETBV, whether the operating system saves the wide
// registers.
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  __builtin_cpu_init();
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

// Linux keeps tiles for those alone who ask; the answer holds for all threads of the process. It
// refuses while a thread has an alternate signal stack too small for them, and afterwards refuses
// such stacks (below some 12 KiB).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch/x86/include/uapi/asm
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  return has_avx512vnni() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         may_use_tiles();
}

const KernelTable& table_with_tiles() {
  static const KernelTable table = [] {
    KernelTable all = avx512vnni::table;
    all.bfloat16 = &amx::bfloat16;
    return all;
  }();
  return table;
}
#endif

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> list = {
#if defined(__x86_64__)
    {"amx", "AVX-512 VNNI and BF16, and AMX BF16 that the system lets us use", &has_amx,
     &table_with_tiles()},
    {"avx512vnni", "AVX-512 F/BW/VL/DQ and VNNI", &has_avx512vnni, &avx512vnni::table},
    {"avx512", "AVX-512 F/BW/VL/DQ", &has_avx512, &avx512::table},
    {"avx2", "AVX2 with FMA and F16C", &has_avx2, &avx2::table},
#endif
    {"portable", "plain C++, any 64-bit CPU", &always, &portable::table},
  };
  return list;
}

Status choose_instruction_set(const char* forced, const InstructionSet** chosen) {
  std::string known;
  for (const InstructionSet& isa : instruction_sets()) {
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
    if (forced ? strcmp(forced, isa.name) != 0 : !isa.supported()) continue;
    if (!isa.supported()) {
      return Status::error(StatusCode::kInvalidArgument,
                           std::string("BITFOLD_ISA=") + forced + ": this machine lacks " +
                               isa.description + "; unset it, or choose another");
    }
    *chosen = &isa;
    return Status::success();
  }
  return Status::error(
      StatusCode::kInvalidArgument,
      std::string("BITFOLD_ISA=") + forced + ": unknown instruction set; known: " + known);
}

const InstructionSet* active_instruction_set(Status* status) {
  struct Choice {
    Status status;
    const InstructionSet* isa = nullptr;
  };
  static const Choice choice = [] {
    Choice made;
    const char* forced = std::getenv("BITFOLD_ISA");
    made.status = choose_instruction_set(forced && *forced ? forced : nullptr, &made.isa);
    return made;
  }();
  *status = choice.status;
  return choice.isa;
}

}  // namespace bitfold
