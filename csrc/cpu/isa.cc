#include "cpu/isa.h"

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
#endif

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> list = {
#if defined(__x86_64__)
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
      return Status::error(StatusCode::kInvalidArgument, std::string("BITFOLD_ISA=") + forced +
                                                             ": this CPU lacks " + isa.description +
                                                             "; unset it, or choose another");
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
