# fastprune_cpu_kernels(<target> <file>...): compiles each file once per instruction set, into a
# namespace of that name; kernels/cpu/dispatch.cpp chooses at run time.
set(FASTPRUNE_KERNEL_FLAGS -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi)
set(FASTPRUNE_ISA_FLAGS_baseline)
set(FASTPRUNE_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FASTPRUNE_ISA_FLAGS_avx512 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c)
set(FASTPRUNE_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND FASTPRUNE_ISAS avx2 avx512)
  set(FASTPRUNE_X86_KERNELS 1)
else()
  set(FASTPRUNE_X86_KERNELS 0)
endif()

function(fastprune_cpu_kernels target)
  foreach(isa IN LISTS FASTPRUNE_ISAS)
    add_library(${target}_${isa} OBJECT ${ARGN})
    target_compile_features(${target}_${isa} PRIVATE cxx_std_17)
    target_compile_definitions(${target}_${isa} PRIVATE FASTPRUNE_CPU_NAMESPACE=${isa})
    target_compile_options(${target}_${isa} PRIVATE ${FASTPRUNE_KERNEL_FLAGS}
                                                    ${FASTPRUNE_ISA_FLAGS_${isa}})
    set_target_properties(${target}_${isa} PROPERTIES POSITION_INDEPENDENT_CODE ON
                                                      CXX_VISIBILITY_PRESET hidden)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${isa}>)
  endforeach()
endfunction()
