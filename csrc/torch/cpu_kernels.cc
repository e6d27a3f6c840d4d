#include "cpu/isa.h"
#include "torch/checks.h"

namespace bitfold::binding {

const KernelTable& kernels(const char* op) {
  Status status;
  const InstructionSet* isa = active_instruction_set(&status);
  check(status, op);
  return *isa->table;
}

const Parallel& torch_parallel() {
  static const Parallel parallel = [](int64_t n, int64_t grain, const RangeBody& body) {
    if (n <= 0) return;
    if (n <= grain) return body(0, n);
    torch::stable::parallel_for(0, n, grain, body);
  };
  return parallel;
}

}  // namespace bitfold::binding
