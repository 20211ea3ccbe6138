// The kernels of a weight gradient, named as in block_sparse_linear_weight_gradient_plan.h, for one
// kind of inputs.
#pragma once

#include <cstring>

#include "block_sparse_linear_weight_gradient_plain.cuh"
#include "block_sparse_linear_weight_gradient_tensor_cores.cuh"

// Two thread blocks on a multiprocessor: at most 255 registers for each thread.
#define FASTPRUNE_TENSOR_CORES_KERNEL(op, Input, T, name, rows, aligned)    \
  extern "C" __global__ void __launch_bounds__(kGradientThreads, 2)         \
      op##_##name(const __grid_constant__ Input<T>::Args args) {            \
    extern __shared__ uint4 shared[];                                       \
    weight_gradient_on_tensor_cores<Input<T>, rows, aligned>(args, shared); \
  }
#define FASTPRUNE_PLAIN_KERNEL(op, Input, T, name, rows)            \
  extern "C" __global__ void __launch_bounds__(kGradientThreads, 2) \
      op##_##name(const __grid_constant__ Input<T>::Args args) {    \
    __shared__ __align__(16) PlainTiles<rows> tiles[2];             \
    weight_gradient_by_multiply_adds<Input<T>, rows>(args, tiles);  \
  }
#define FASTPRUNE_KERNEL_ENTRY(op, Input, T, name, ...) \
  {#op "_" #name, reinterpret_cast<const void*>(&op##_##name)},

#define FASTPRUNE_WEIGHT_GRADIENTS_OF(tensor_cores, plain, op, Input, T, type, tensor_core_type) \
  tensor_cores(op, Input, T, tensor_core_type##_16, 16, true)                                    \
      tensor_cores(op, Input, T, tensor_core_type##_32, 32, true)                                \
          tensor_cores(op, Input, T, tensor_core_type##_64, 64, true)                            \
              tensor_cores(op, Input, T, tensor_core_type##_128, 128, true) tensor_cores(        \
                  op, Input, T, tensor_core_type##_16_narrow, 16, false)                         \
                  tensor_cores(op, Input, T, tensor_core_type##_32_narrow, 32, false)            \
                      tensor_cores(op, Input, T, tensor_core_type##_64_narrow, 64, false)        \
                          tensor_cores(op, Input, T, tensor_core_type##_128_narrow, 128, false)  \
                              plain(op, Input, T, plain_##type##_16, 16)                         \
                                  plain(op, Input, T, plain_##type##_64, 64)
#define FASTPRUNE_WEIGHT_GRADIENTS(tensor_cores, plain, op, Input)                \
  FASTPRUNE_WEIGHT_GRADIENTS_OF(tensor_cores, plain, op, Input, float, f32, tf32) \
  FASTPRUNE_WEIGHT_GRADIENTS_OF(tensor_cores, plain, op, Input, __half, f16, f16) \
  FASTPRUNE_WEIGHT_GRADIENTS_OF(tensor_cores, plain, op, Input, __nv_bfloat16, bf16, bf16)

// All kernels of an op, and op##_kernels, which holds them with their names.
#define FASTPRUNE_WEIGHT_GRADIENT_KERNELS(op, Input)                                           \
  FASTPRUNE_WEIGHT_GRADIENTS(FASTPRUNE_TENSOR_CORES_KERNEL, FASTPRUNE_PLAIN_KERNEL, op, Input) \
  static const WeightGradientKernel op##_kernels[] = {                                         \
      FASTPRUNE_WEIGHT_GRADIENTS(FASTPRUNE_KERNEL_ENTRY, FASTPRUNE_KERNEL_ENTRY, op, Input)};

namespace fastprune {

struct WeightGradientKernel {
  const char* name;
  const void* function;
};

// By name, so that what the plan names, and the tests run, is what is launched.
template <int kKernels>
cudaError_t launch_weight_gradient_kernel(const WeightGradientKernel (&kernels)[kKernels],
                                          const LaunchPlan& plan, const void* args,
                                          cudaStream_t stream) {
  for (const WeightGradientKernel& kernel : kernels) {
    if (std::strcmp(kernel.name, plan.kernel) != 0) continue;
    void* arguments[] = {const_cast<void*>(args)};
    return cudaLaunchKernel(kernel.function, dim3(plan.grid[0], plan.grid[1], plan.grid[2]),
                            dim3(plan.block[0], plan.block[1], plan.block[2]), arguments,
                            plan.shared_bytes, stream);
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace fastprune
