# Options of every target of ours.
#   -ffp-contract=off     a*b+c is fused only where the source says so: one result on every instruction set
#   -ffile-prefix-map     messages and debug information name files relative to the repository
#   BITFOLD_SANITIZE      instruments everything, tests included
function(bitfold_compile_options target)
  target_compile_options(${target} PRIVATE
    -O3 -ffp-contract=off -fvisibility=hidden
    "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/="
    -Wall -Wextra -Wno-psabi
    # g++ 12 sees overlapping copies in std::string's operator+ where there are none (GCC bug 105651).
    $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-restrict>
    $<$<BOOL:${BITFOLD_WERROR}>:-Werror>)
  target_compile_definitions(${target} PRIVATE BITFOLD_VERSION="${BITFOLD_VERSION}")
  if(BITFOLD_SANITIZE)
    target_compile_options(${target} PRIVATE
      -O1 -g -fno-omit-frame-pointer -fsanitize=${BITFOLD_SANITIZE} -fno-sanitize-recover=all)
    target_link_options(${target} PRIVATE -fsanitize=${BITFOLD_SANITIZE})
  endif()
endfunction()
