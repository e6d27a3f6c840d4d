# Finds torch's headers and CPU libraries by path. find_package(Torch) is avoided on purpose: with a CUDA build of torch it
# insists on a CUDA toolkit, which building the CPU operators does not need.
#
# Looked for in this order: -DBITFOLD_TORCH_DIR, the environment variable of that name (the folder `torch` itself,
# as in site-packages/torch), the interpreter. Sets BITFOLD_TORCH_DIR and the target bitfold_torch.
set(BITFOLD_TORCH_DIR "$ENV{BITFOLD_TORCH_DIR}" CACHE PATH "The installed package folder of torch (site-packages/torch)")
if(NOT BITFOLD_TORCH_DIR)
  # find_spec locates the package without importing it, which would take seconds.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s and s.origin else '', end='')"
    OUTPUT_VARIABLE torch_dir)
  if(NOT torch_dir)
    message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: install torch >= 2.11 there, or name its folder with BITFOLD_TORCH_DIR")
  endif()
  set(BITFOLD_TORCH_DIR "${torch_dir}" CACHE PATH "" FORCE)
endif()

if(NOT EXISTS "${BITFOLD_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "BITFOLD_TORCH_DIR=${BITFOLD_TORCH_DIR} holds no include/torch/csrc/stable/library.h: it must be the folder of an installed torch >= 2.11, such as …/site-packages/torch")
endif()
file(STRINGS "${BITFOLD_TORCH_DIR}/version.py" torch_version_line REGEX "^__version__ = ")
string(REGEX MATCH "[0-9]+\\.[0-9]+[^'\"]*" BITFOLD_TORCH_VERSION "${torch_version_line}")
if(BITFOLD_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${BITFOLD_TORCH_VERSION} in ${BITFOLD_TORCH_DIR} is too old: bitfold needs torch >= 2.11")
endif()
message(STATUS "torch ${BITFOLD_TORCH_VERSION} in ${BITFOLD_TORCH_DIR}")

add_library(bitfold_torch INTERFACE)
target_include_directories(bitfold_torch SYSTEM INTERFACE "${BITFOLD_TORCH_DIR}/include")
# torch's headers put their own path into error messages.
target_compile_options(bitfold_torch INTERFACE "-ffile-prefix-map=${BITFOLD_TORCH_DIR}/include/=")
# The oldest torch whose stable ABI the binary may use: 2.11.
target_compile_definitions(bitfold_torch INTERFACE TORCH_TARGET_VERSION=0x020B000000000000)
# libtorch_cpu.so holds the whole stable ABI, in CUDA builds of torch as well.
target_link_libraries(bitfold_torch INTERFACE "${BITFOLD_TORCH_DIR}/lib/libtorch_cpu.so")
