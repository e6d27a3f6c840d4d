# _ops_cuda: the ops on a GPU, a library of its own, which bitfold loads only where torch has started CUDA.
#   BITFOLD_CUDA                AUTO (built where nvcc is found), ON (an error where it is not), OFF
#   BITFOLD_CUDA_ARCHITECTURES  CMake's CUDA_ARCHITECTURES; `native` for the GPU at hand, one number for a quick build
# Each is first looked for as -D…, then as an environment variable, so that `pip install .` can be told.
set(bitfold_cuda_default AUTO)
if(DEFINED ENV{BITFOLD_CUDA} AND NOT "$ENV{BITFOLD_CUDA}" STREQUAL "")
  set(bitfold_cuda_default $ENV{BITFOLD_CUDA})
endif()
set(BITFOLD_CUDA ${bitfold_cuda_default} CACHE STRING "Build the CUDA ops: AUTO, ON or OFF")
# Machine code for each generation that nvcc 13 knows, and PTX for what comes after.
set(bitfold_cuda_architectures 80-real 86-real 89-real 90a-real 100-real 120)
if(DEFINED ENV{BITFOLD_CUDA_ARCHITECTURES} AND NOT "$ENV{BITFOLD_CUDA_ARCHITECTURES}" STREQUAL "")
  set(bitfold_cuda_architectures $ENV{BITFOLD_CUDA_ARCHITECTURES})
endif()
set(BITFOLD_CUDA_ARCHITECTURES "${bitfold_cuda_architectures}" CACHE STRING "GPU architectures of _ops_cuda")

# What of the architectures the kernels cannot be compiled for: bfloat16 and asynchronous copies begin with 80.
function(bitfold_find_old_architectures result)
  set(found ${BITFOLD_CUDA_ARCHITECTURES})
  if(found STREQUAL "native")
    set(found ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
    if(NOT found)
      set(found "none, since there is no GPU here")
    endif()
  endif()
  list(FILTER found EXCLUDE REGEX "^([89][0-9]|[1-9][0-9][0-9])[a-z]?(-real|-virtual)?$")
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

set(BITFOLD_CUDA_BUILT "")  # the architectures, where _ops_cuda is built
if(NOT BITFOLD_CUDA MATCHES "^(OFF|0|NO|FALSE)$")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES "${BITFOLD_CUDA_ARCHITECTURES}")
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it yet
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    bitfold_find_old_architectures(bitfold_old)
    string(CONCAT bitfold_refusal "BITFOLD_CUDA_ARCHITECTURES=${BITFOLD_CUDA_ARCHITECTURES} asks for ${bitfold_old}; "
      "_ops_cuda can be compiled for numbers from 80 (Ampere) on, such as 80-real or 90a-real, and for native where such a GPU is")
    if(NOT bitfold_old)
      find_package(CUDAToolkit REQUIRED)
      set(BITFOLD_CUDA_BUILT "${BITFOLD_CUDA_ARCHITECTURES}")
    elseif(BITFOLD_CUDA STREQUAL "AUTO" AND BITFOLD_CUDA_ARCHITECTURES STREQUAL "native")
      message(WARNING "${bitfold_refusal}: it is left out")
    else()
      message(FATAL_ERROR "${bitfold_refusal}")
    endif()
  elseif(BITFOLD_CUDA STREQUAL "AUTO")
    message(STATUS "nvcc was not found: _ops_cuda is left out (CUDACXX names one)")
  else()
    message(FATAL_ERROR "BITFOLD_CUDA=${BITFOLD_CUDA}, but nvcc was not found: put it on PATH, or name it with CUDACXX")
  endif()
endif()

# The library that holds what torch offers for CUDA. A CPU build of torch has none; _ops_cuda must name it all the same, or
# nothing would bring in its symbols on the machine with a GPU: there a stub of that name is linked, and never shipped.
function(bitfold_torch_cuda_library result)
  set(library "${BITFOLD_TORCH_DIR}/lib/libtorch_cuda.so")
  if(EXISTS "${library}")
    set(${result} "${library}" PARENT_SCOPE)
    return()
  endif()
  set(source "${PROJECT_BINARY_DIR}/torch_cuda_stub.cc")
  # What the bindings take from it; a symbol that is missing here fails at link time.
  file(WRITE "${source}.new" "extern \"C\" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
int aoti_torch_cuda_mm_out(void*, void*, void*) { return 1; }
int aoti_torch_cuda_addmm_out(void*, void*, void*, void*, double, double) { return 1; }
}
")
  file(COPY_FILE "${source}.new" "${source}" ONLY_IF_DIFFERENT)
  add_library(torch_cuda_stub SHARED "${source}")
  set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda
    LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/stub" CXX_VISIBILITY_PRESET default)
  set(${result} torch_cuda_stub PARENT_SCOPE)
endfunction()

function(bitfold_add_cuda_library)
  add_library(_ops_cuda MODULE ${BITFOLD_CUDA_SOURCES} ${BITFOLD_OPS_CUDA_SOURCES})
  set_target_properties(_ops_cuda PROPERTIES PREFIX "" SUFFIX ".so" LINKER_LANGUAGE CXX CUDA_RUNTIME_LIBRARY Static)
  # As compile_options.cmake for C++. -fmad=false is -ffp-contract=off: kernels that want fused arithmetic write fmaf.
  target_compile_options(_ops_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:-O3;-fmad=false;-Xcompiler=-fvisibility=hidden,-ffp-contract=off,-Wall,-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>"
    "$<$<COMPILE_LANGUAGE:CXX>:-O3;-ffp-contract=off;-fvisibility=hidden;-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=;-Wall;-Wextra;-Wno-psabi>"
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${BITFOLD_WERROR}>>:-Werror>)
  bitfold_torch_cuda_library(torch_cuda)
  target_link_libraries(_ops_cuda PRIVATE bitfold_core bitfold_torch CUDA::cudart_static)
  target_compile_definitions(_ops_cuda PRIVATE USE_CUDA)  # torch's headers show the stream's functions only then
  # libtorch_cuda.so is needed by name even where the linker saw no use of it.
  target_link_libraries(_ops_cuda PRIVATE -Wl,--push-state,--no-as-needed ${torch_cuda} -Wl,--pop-state)
  # Our copy of the CUDA runtime is ours alone: its symbols must not meet those of the one that torch has loaded.
  target_link_options(_ops_cuda PRIVATE -Wl,--no-undefined -Wl,--exclude-libs,ALL)
endfunction()
