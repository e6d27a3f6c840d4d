# GoogleTest binaries, one per file of BITFOLD_CPP_TESTS and BITFOLD_CPP_PER_ISA_TESTS (cmake/sources.cmake).
include(cmake/find_googletest.cmake)

# The tests must link without torch and without Python: nothing but the core and GoogleTest is on the line.
function(bitfold_add_cpp_test name)
  string(REPLACE "/" "_" target "${name}_test")
  add_executable(${target} tests/cpp/${name}_test.cc)
  bitfold_compile_options(${target})
  target_include_directories(${target} PRIVATE tests/cpp)
  target_link_libraries(${target} PRIVATE bitfold_core GTest::gtest_main)
  set(BITFOLD_TEST_TARGET ${target} PARENT_SCOPE)
endfunction()

foreach(name IN LISTS BITFOLD_CPP_TESTS)
  bitfold_add_cpp_test(${name})
  add_test(NAME ${name} COMMAND ${BITFOLD_TEST_TARGET})
endforeach()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  target_sources(cpu_bfloat16_product_test PRIVATE tests/cpp/cpu/amx_emulator.cc)
endif()

# CUDA kernels, compiled as C++ and run by an emulation of threads.
foreach(target cuda_kernels_test cuda_linear_kernels_test cuda_linear_mixed_test solvers_cuda_awq_test solvers_cuda_gptq_test
    solvers_cuda_hessian_test solvers_cuda_hqq_test)
  target_sources(${target} PRIVATE tests/cpp/cuda/emulator.cc)
  target_compile_options(${target} PRIVATE -Wno-unknown-pragmas)  # unroll
endforeach()
foreach(target cuda_kernels_test solvers_cuda_awq_test solvers_cuda_gptq_test solvers_cuda_hqq_test)
  target_sources(${target} PRIVATE csrc/cuda/quantize.cc)
endforeach()
foreach(name awq_clip awq_scale layer scales)
  target_sources(solvers_cuda_awq_test PRIVATE csrc/solvers/cuda/${name}.cc)
endforeach()
foreach(name feedback gptq layer refit scales)
  target_sources(solvers_cuda_gptq_test PRIVATE csrc/solvers/cuda/${name}.cc)
endforeach()
target_sources(solvers_cuda_hessian_test PRIVATE csrc/solvers/cuda/hessian.cc)
target_sources(solvers_cuda_hqq_test PRIVATE csrc/solvers/cuda/hqq.cc)

# Where the CPU lacks the instruction set, csrc/cpu/isa.cc refuses in these words, and the test counts as skipped.
foreach(name IN LISTS BITFOLD_CPP_PER_ISA_TESTS)
  bitfold_add_cpp_test(${name})
  add_test(NAME ${name} COMMAND ${BITFOLD_TEST_TARGET})
  set(isas ${BITFOLD_ISA_PORTABLE})
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
    list(APPEND isas ${BITFOLD_ISA_X86})
  endif()
  foreach(isa IN LISTS isas)
    add_test(NAME ${name}/${isa} COMMAND ${BITFOLD_TEST_TARGET})
    set_tests_properties(${name}/${isa} PROPERTIES
      ENVIRONMENT BITFOLD_ISA=${isa} LABELS per_isa SKIP_REGULAR_EXPRESSION "this machine lacks")
  endforeach()
endforeach()

# Instrumented and unoptimized code keeps more functions out of line than what is shipped.
if(CMAKE_BUILD_TYPE STREQUAL "Release" AND NOT BITFOLD_SANITIZE)
  add_test(NAME target_symbols COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM}
    "-DOBJECTS=$<FILTER:$<TARGET_OBJECTS:bitfold_core>,INCLUDE,/targets/>"
    -P ${PROJECT_SOURCE_DIR}/cmake/check_target_symbols.cmake)
endif()
