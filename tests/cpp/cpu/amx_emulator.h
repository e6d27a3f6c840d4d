// AMX on CPUs without it: each of its instructions raises SIGILL, whose handler does what the
// instruction would. So the kernels are tested as they were compiled; only their speed is not.
#pragma once

namespace bitfold::testing {

// From now on, for all threads.
void emulate_amx();

}  // namespace bitfold::testing
