// Which instruction sets are built in, which this machine can run, and the one that runs.
#pragma once

#include <vector>

#include "core/status.h"
#include "cpu/kernel_table.h"

namespace bitfold {

struct InstructionSet {
  const char* name;
  const char* description;
  // By CPU and operating system; of AMX this asks the system for leave, for the whole process.
  bool (*supported)();
  const KernelTable* table;
};

// Best first.
const std::vector<InstructionSet>& instruction_sets();

// The first supported one, or the one that the environment variable BITFOLD_ISA names. Decided
// once; an unknown or unsupported name is an error, never a quiet fallback.
Status choose_instruction_set(const char* forced, const InstructionSet** chosen);
const InstructionSet* active_instruction_set(Status* status);

}  // namespace bitfold
