# Fails if a file of one instruction set defines a symbol that others could be linked to. An inline function compiled there, with
# wide instructions, may be the one copy that the linker keeps for the whole library; an older CPU then dies on it.
#   cmake -DNM=nm -DOBJECTS="a.o;b.o" -P check_target_symbols.cmake
foreach(object IN LISTS OBJECTS)
  get_filename_component(isa "${object}" NAME)
  string(REGEX REPLACE "\\..*" "" isa "${isa}")  # avx2.cc.o -> avx2
  if(isa STREQUAL "portable")
    continue()
  endif()
  execute_process(COMMAND ${NM} -C --defined-only --extern-only "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE ";" "," symbols "${symbols}")
  string(REGEX REPLACE "\n" ";" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(symbol AND NOT symbol MATCHES "bitfold::${isa}::")
      message(SEND_ERROR "${isa}: defines ${symbol}, which is outside namespace bitfold::${isa}")
    endif()
  endforeach()
endforeach()
