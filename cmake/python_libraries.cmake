# The libraries inside the Python package: _ops.so, _ops_cuda.so where nvcc is found, and _C.<abi>.so.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
if(NOT pybind11_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_cmake_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 2.13 CONFIG REQUIRED HINTS ${pybind11_cmake_dir})
include(cmake/find_torch.cmake)
include(cmake/cuda.cmake)

# Stays a MODULE named exactly _ops.so: torch.ops.load_library opens it by path, and it uses nothing of CPython, so one
# file serves every Python.
add_library(_ops MODULE ${BITFOLD_OPS_SOURCES})
set_target_properties(_ops PROPERTIES PREFIX "" SUFFIX ".so")
bitfold_compile_options(_ops)
target_link_libraries(_ops PRIVATE bitfold_core bitfold_torch)
target_link_options(_ops PRIVATE -Wl,--no-undefined)  # a symbol that nobody defines fails here, not on the user's machine

# NO_EXTRAS: no link-time optimization, which could move wide instructions into code that runs everywhere.
pybind11_add_module(_C MODULE NO_EXTRAS ${BITFOLD_PYTHON_SOURCES})
bitfold_compile_options(_C)
target_link_libraries(_C PRIVATE bitfold_core)
target_compile_definitions(_C PRIVATE
  BITFOLD_TORCH_VERSION="${BITFOLD_TORCH_VERSION}"
  BITFOLD_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  BITFOLD_BUILD_TYPE="${CMAKE_BUILD_TYPE}")

set(bitfold_libraries _ops _C)
if(BITFOLD_CUDA_BUILT)
  bitfold_add_cuda_library()
  list(APPEND bitfold_libraries _ops_cuda)
elseif(BITFOLD_INPLACE)
  file(REMOVE ${PROJECT_SOURCE_DIR}/python/bitfold/_ops_cuda.so)  # of an earlier build that had it
endif()
list(JOIN BITFOLD_CUDA_BUILT "," architectures)  # semicolons would make several definitions of it
target_compile_definitions(_C PRIVATE "BITFOLD_CUDA_BUILT=\"${architectures}\"")

# No path of the build environment in any file: torch is imported, and so loaded, before _ops is.
set_target_properties(${bitfold_libraries} PROPERTIES SKIP_BUILD_RPATH ON INSTALL_RPATH "")
if(BITFOLD_INPLACE)
  set_target_properties(${bitfold_libraries} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_SOURCE_DIR}/python/bitfold)
endif()
install(TARGETS ${bitfold_libraries} LIBRARY DESTINATION bitfold)
