# The target `torch_stable`: torch's headers and libtorch_cpu of the Python that builds, for code
# that uses only torch's stable ABI. find_package(Torch) is not used: with a CUDA torch it demands
# a whole CUDA toolkit, cuBLAS included, also for a build without CUDA.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import torch, os; print(os.path.dirname(torch.__file__), torch.__version__, torch.version.cuda or 'none', sep=';')"
  OUTPUT_VARIABLE FASTPRUNE_TORCH
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE FASTPRUNE_TORCH_RESULT)
if(NOT FASTPRUNE_TORCH_RESULT EQUAL 0)
  message(FATAL_ERROR "fastprune builds against the torch that is installed, and ${Python_EXECUTABLE} "
                      "has none. Install torch >= 2.11, then: pip install --no-build-isolation .")
endif()
list(GET FASTPRUNE_TORCH 0 FASTPRUNE_TORCH_ROOT)
list(GET FASTPRUNE_TORCH 1 FASTPRUNE_TORCH_VERSION)
list(GET FASTPRUNE_TORCH 2 FASTPRUNE_TORCH_CUDA)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" FASTPRUNE_TORCH_RELEASE "${FASTPRUNE_TORCH_VERSION}")
if(FASTPRUNE_TORCH_RELEASE VERSION_LESS 2.11)
  message(FATAL_ERROR "fastprune needs torch >= 2.11, found ${FASTPRUNE_TORCH_VERSION}")
endif()

find_library(FASTPRUNE_LIBTORCH_CPU torch_cpu PATHS "${FASTPRUNE_TORCH_ROOT}/lib"
             NO_DEFAULT_PATH NO_CACHE REQUIRED)
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${FASTPRUNE_TORCH_ROOT}/include")
target_link_libraries(torch_stable INTERFACE "${FASTPRUNE_LIBTORCH_CPU}")
# 2.11: one binary serves this torch and all later ones, and nothing newer can slip in.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
