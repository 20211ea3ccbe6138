# The module `_C_cuda`, built where torch has CUDA and nvcc is found. FASTPRUNE_CUDA_STATUS says what
# was done, and why.
set(FASTPRUNE_CUDA_SOURCES
    csrc/kernels/cuda/ablate_linear.cu
    csrc/kernels/cuda/ablated_cross_entropy.cu
    csrc/kernels/cuda/ablated_mlp_cross_entropy.cu
    csrc/kernels/cuda/block_sparse_conv2d.cu
    csrc/kernels/cuda/block_sparse_conv2d_bf16.cu
    csrc/kernels/cuda/block_sparse_conv2d_f16.cu
    csrc/kernels/cuda/block_sparse_conv2d_structure.cu
    csrc/kernels/cuda/block_sparse_conv2d_tf32.cu
    csrc/kernels/cuda/block_sparse_conv2d_weight_gradient.cu
    csrc/kernels/cuda/block_sparse_linear.cu
    csrc/kernels/cuda/block_sparse_linear_bf16.cu
    csrc/kernels/cuda/block_sparse_linear_f16.cu
    csrc/kernels/cuda/block_sparse_linear_tf32.cu
    csrc/kernels/cuda/block_sparse_linear_weight_gradient.cu
    csrc/kernels/cuda/loss_panels.cu
    csrc/kernels/cuda/transposed_structure.cu)
set(FASTPRUNE_CUDA_BINDINGS csrc/bindings/cuda_module.cpp
                            csrc/bindings/ablate_linear_cuda.cpp
                            csrc/bindings/ablated_cross_entropy_cuda.cpp
                            csrc/bindings/ablated_mlp_cross_entropy_cuda.cpp
                            csrc/bindings/block_sparse_conv2d_cuda.cpp
                            csrc/bindings/block_sparse_conv2d_weight_gradient_cuda.cpp
                            csrc/bindings/block_sparse_linear_cuda.cpp
                            csrc/bindings/block_sparse_linear_weight_gradient_cuda.cpp)

if(CMAKE_CUDA_COMPILER)
  set(FASTPRUNE_NVCC "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  set(FASTPRUNE_NVCC "$ENV{CUDACXX}")
else()
  find_program(FASTPRUNE_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
               PATH_SUFFIXES bin)
endif()

if(FASTPRUNE_TORCH_CUDA STREQUAL "none")
  set(FASTPRUNE_CUDA_LACKS "torch ${FASTPRUNE_TORCH_VERSION} has no CUDA")
elseif(NOT FASTPRUNE_NVCC)
  set(FASTPRUNE_CUDA_LACKS "nvcc was not found")
else()
  set(FASTPRUNE_CUDA_LACKS "")
endif()
if(NOT FASTPRUNE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FASTPRUNE_CUDA must be AUTO, ON or OFF, got '${FASTPRUNE_CUDA}'")
elseif(FASTPRUNE_CUDA STREQUAL "OFF")
  set(FASTPRUNE_CUDA_STATUS "not built: FASTPRUNE_CUDA=OFF")
elseif(FASTPRUNE_CUDA_LACKS)
  if(FASTPRUNE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FASTPRUNE_CUDA=ON, but ${FASTPRUNE_CUDA_LACKS}. The CUDA kernels need a "
                        "torch with CUDA, and nvcc on the PATH, in CUDACXX or in CUDA_HOME/bin.")
  endif()
  set(FASTPRUNE_CUDA_STATUS "not built: ${FASTPRUNE_CUDA_LACKS}")
else()
  if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # Those of the list that this nvcc knows: 100 and 120 came with 12.8.
    execute_process(COMMAND "${FASTPRUNE_NVCC}" --list-gpu-arch OUTPUT_VARIABLE known)
    string(REGEX MATCHALL "[0-9]+" known "${known}")
    set(CMAKE_CUDA_ARCHITECTURES)
    foreach(architecture IN ITEMS 80 86 89 90 100 120)
      if(architecture IN_LIST known)
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture})
      endif()
    endforeach()
  endif()
  set(CMAKE_CUDA_COMPILER "${FASTPRUNE_NVCC}")
  enable_language(CUDA)
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES PREPEND "sm_" OUTPUT_VARIABLE FASTPRUNE_SM)
  list(JOIN FASTPRUNE_SM " " FASTPRUNE_SM)
  set(FASTPRUNE_CUDA_STATUS "built with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${FASTPRUNE_SM}")

  find_library(FASTPRUNE_LIBTORCH_CUDA torch_cuda PATHS "${FASTPRUNE_TORCH_ROOT}/lib"
               NO_DEFAULT_PATH NO_CACHE REQUIRED)
  pybind11_add_module(_C_cuda ${FASTPRUNE_CUDA_BINDINGS} ${FASTPRUNE_CUDA_SOURCES})
  # libtorch_cuda holds one symbol that is used, the current stream; torch has it in memory
  # already. CUDA's runtime is linked in statically: it needs the driver alone, whichever runtime
  # torch brings.
  target_link_libraries(_C_cuda PRIVATE torch_stable "${FASTPRUNE_LIBTORCH_CUDA}")
  target_include_directories(_C_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(
    _C_cuda
    PRIVATE USE_CUDA # torch's shim declares the stream only then
            FASTPRUNE_VERSION="${PROJECT_VERSION}"
            FASTPRUNE_BUILT_WITH_TORCH="${FASTPRUNE_TORCH_VERSION}"
            FASTPRUNE_CUDA_ARCHITECTURES="${FASTPRUNE_SM}")
  target_compile_options(
    _C_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
                    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra -lineinfo>)
  set_target_properties(
    _C_cuda
    PROPERTIES CUDA_STANDARD 17
               CUDA_STANDARD_REQUIRED ON
               CUDA_RUNTIME_LIBRARY Static
               CUDA_VISIBILITY_PRESET hidden
               INTERPROCEDURAL_OPTIMIZATION OFF
               BUILD_RPATH_USE_ORIGIN ON
               INSTALL_RPATH "$ORIGIN/../torch/lib")
  install(TARGETS _C_cuda LIBRARY DESTINATION fastprune)
endif()
message(STATUS "fastprune CUDA kernels: ${FASTPRUNE_CUDA_STATUS}")
