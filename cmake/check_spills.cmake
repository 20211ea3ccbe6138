# cmake -DNVCC= -DSOURCE= -DARCHITECTURE= -DOUTPUT= -P check_spills.cmake
# Compiles one CUDA source and fails where ptxas had to spill registers to memory.
get_filename_component(folder "${OUTPUT}" DIRECTORY)
file(MAKE_DIRECTORY "${folder}")
file(REMOVE "${OUTPUT}")
execute_process(
  COMMAND "${NVCC}" -std=c++17 -O3 -arch=${ARCHITECTURE} -Xptxas -v -Xcompiler=-Wall,-Wextra -cubin
          -o "${OUTPUT}" "${SOURCE}"
  RESULT_VARIABLE result
  OUTPUT_VARIABLE log
  ERROR_VARIABLE log)
get_filename_component(name "${SOURCE}" NAME)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${name} for ${ARCHITECTURE} does not compile:\n${log}")
endif()

string(REGEX MATCHALL "Compiling entry function '[^']*'" kernels "${log}")
string(REGEX MATCHALL "[0-9]+ bytes spill stores, [0-9]+ bytes spill loads" spills "${log}")
string(REGEX MATCHALL "Used [0-9]+ registers[^\n]*" registers "${log}")
list(LENGTH kernels kernel_count)
list(LENGTH registers register_count)
# Device functions that were not inlined report spills of their own, but no registers.
list(LENGTH spills spill_count)
if(kernel_count EQUAL 0 OR NOT register_count EQUAL kernel_count OR spill_count LESS kernel_count)
  file(REMOVE "${OUTPUT}")
  message(FATAL_ERROR "${name} for ${ARCHITECTURE}: ptxas -v is not understood:\n${log}")
endif()
foreach(kernel used IN ZIP_LISTS kernels registers)
  string(REGEX REPLACE ".*'(.*)'" "\\1" kernel "${kernel}")
  message(STATUS "${name} ${ARCHITECTURE} ${kernel}: ${used}")
endforeach()
string(REGEX MATCH "[1-9][0-9]* bytes spill" spilled "${spills}")
if(spilled)
  file(REMOVE "${OUTPUT}")
  message(FATAL_ERROR "${name} for ${ARCHITECTURE} spills registers:\n${log}")
endif()
