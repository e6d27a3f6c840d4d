# One file of csrc/cpu/targets per instruction set, each compiled with its own flags; which one runs is chosen at
# run time. Wide flags belong to these files alone: anything else must run on every 64-bit CPU.
# Each list is what csrc/cpu/isa.cc asks the CPU for before it chooses that file, no more: the compiler may use any
# instruction that it is allowed. (Features by name: g++ 12 has no -march=znver4.)
set(BITFOLD_FLAGS_portable "")
set(BITFOLD_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(BITFOLD_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c
  -Wno-maybe-uninitialized -Wno-uninitialized)  # g++ 12's own intrinsics headers (GCC bug 105593)
set(BITFOLD_FLAGS_avx512vnni ${BITFOLD_FLAGS_avx512} -mavx512vnni)
set(BITFOLD_FLAGS_amx ${BITFOLD_FLAGS_avx512vnni} -mavx512bf16 -mamx-tile -mamx-bf16)

# Adds the target files that suit the CPU being compiled for, and defines BITFOLD_HAVE_<NAME>=1 for each.
function(bitfold_add_isa_targets library)
  set(isas ${BITFOLD_ISA_PORTABLE})
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
    list(APPEND isas ${BITFOLD_ISA_X86})
  endif()
  foreach(isa IN LISTS isas)
    set(file csrc/cpu/targets/${isa}.cc)
    target_sources(${library} PRIVATE ${file})
    set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${BITFOLD_FLAGS_${isa}}")
    string(TOUPPER ${isa} upper)
    target_compile_definitions(${library} PUBLIC BITFOLD_HAVE_${upper}=1)
  endforeach()
endfunction()
