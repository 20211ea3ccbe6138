// block_sparse_linear_weight_gradient on CUDA; the contract is in
// ../block_sparse_linear_weight_gradient.h. Two kernels compute it, each with its picture in a
// header of its own: on tensor cores, and by plain multiply-adds.
//
// Where few blocks are kept, the samples are cut into slices of equal length (a function of the
// sizes alone). Each slice stores its sums in float32, and a second kernel adds them in order: no
// atomics, and the same bits in every run.
#include "block_sparse_linear_weight_gradient.h"

#include <cstring>

#include "block_sparse_linear_weight_gradient_plain.cuh"
#include "block_sparse_linear_weight_gradient_tensor_cores.cuh"

namespace fastprune {
namespace {

template <class T>
__device__ __forceinline__ void add_slices(const BlockSparseLinearWeightGradientCudaArgs<T>& args) {
  const int64_t i = int64_t{blockIdx.x} * kGradientSumThreads + threadIdx.x;
  if (i >= args.size) return;
  float sum = args.partial_sums[i];
  for (int64_t s = 1; s < args.slices; ++s) sum += args.partial_sums[s * args.size + i];
  store(args.gradient.grad_values + i, sum);
}

}  // namespace

// Two thread blocks on a multiprocessor: at most 255 registers for each thread.
#define FASTPRUNE_TENSOR_CORES(name, T, rows, aligned)                               \
  extern "C" __global__ void __launch_bounds__(kGradientThreads, 2)                  \
      block_sparse_linear_weight_gradient_##name(                                    \
          const __grid_constant__ BlockSparseLinearWeightGradientCudaArgs<T> args) { \
    extern __shared__ uint4 shared[];                                                \
    weight_gradient_on_tensor_cores<T, rows, aligned>(args, shared);                 \
  }
#define FASTPRUNE_PLAIN(name, T, rows)                                               \
  extern "C" __global__ void __launch_bounds__(kGradientThreads, 2)                  \
      block_sparse_linear_weight_gradient_##name(                                    \
          const __grid_constant__ BlockSparseLinearWeightGradientCudaArgs<T> args) { \
    __shared__ __align__(16) PlainTiles<rows> tiles[2];                              \
    weight_gradient_by_multiply_adds<T, rows>(args, tiles);                          \
  }
#define FASTPRUNE_SUM(name, T)                                                       \
  extern "C" __global__ void __launch_bounds__(kGradientSumThreads)                  \
      block_sparse_linear_weight_gradient_##name(                                    \
          const __grid_constant__ BlockSparseLinearWeightGradientCudaArgs<T> args) { \
    add_slices(args);                                                                \
  }
#define FASTPRUNE_ENTRY(name, ...)               \
  {"block_sparse_linear_weight_gradient_" #name, \
   reinterpret_cast<const void*>(&block_sparse_linear_weight_gradient_##name)},

#define FASTPRUNE_KERNELS_OF(tensor_cores, plain, sum, type, tensor_core_type, T)                 \
  tensor_cores(tensor_core_type##_16, T, 16, true)                                                \
      tensor_cores(tensor_core_type##_32, T, 32, true)                                            \
          tensor_cores(tensor_core_type##_64, T, 64, true)                                        \
              tensor_cores(tensor_core_type##_128, T, 128, true)                                  \
                  tensor_cores(tensor_core_type##_16_narrow, T, 16, false)                        \
                      tensor_cores(tensor_core_type##_32_narrow, T, 32, false)                    \
                          tensor_cores(tensor_core_type##_64_narrow, T, 64, false)                \
                              tensor_cores(tensor_core_type##_128_narrow, T, 128, false)          \
                                  plain(plain_##type##_16, T, 16) plain(plain_##type##_64, T, 64) \
                                      sum(sum_##type, T)
#define FASTPRUNE_KERNELS(tensor_cores, plain, sum)                \
  FASTPRUNE_KERNELS_OF(tensor_cores, plain, sum, f32, tf32, float) \
  FASTPRUNE_KERNELS_OF(tensor_cores, plain, sum, f16, f16, __half) \
  FASTPRUNE_KERNELS_OF(tensor_cores, plain, sum, bf16, bf16, __nv_bfloat16)

FASTPRUNE_KERNELS(FASTPRUNE_TENSOR_CORES, FASTPRUNE_PLAIN, FASTPRUNE_SUM)

namespace {

struct Kernel {
  const char* name;
  const void* function;
};
constexpr int kKernels = 33;

// By name, so that what the plan names, and the tests run, is what is launched.
cudaError_t launch(const LaunchPlan& plan, const void* args, cudaStream_t stream) {
  static const Kernel kernels[kKernels] = {
      FASTPRUNE_KERNELS(FASTPRUNE_ENTRY, FASTPRUNE_ENTRY, FASTPRUNE_ENTRY)};
  for (const Kernel& kernel : kernels) {
    if (std::strcmp(kernel.name, plan.kernel) != 0) continue;
    void* arguments[] = {const_cast<void*>(args)};
    return cudaLaunchKernel(kernel.function, dim3(plan.grid[0], plan.grid[1], plan.grid[2]),
                            dim3(plan.block[0], plan.block[1], plan.block[2]), arguments,
                            plan.shared_bytes, stream);
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace

template <class T>
cudaError_t launch_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientCudaArgs<T>& args,
    const BlockSparseLinearWeightGradientPlan& plan, cudaStream_t stream) {
  if (plan.product.grid[0] == 0) return cudaSuccess;
  const cudaError_t status = launch(plan.product, &args, stream);
  if (status != cudaSuccess || plan.sum.grid[0] == 0) return status;
  return launch(plan.sum, &args, stream);
}

template cudaError_t launch_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientCudaArgs<float>&,
    const BlockSparseLinearWeightGradientPlan&, cudaStream_t);
template cudaError_t launch_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientCudaArgs<__half>&,
    const BlockSparseLinearWeightGradientPlan&, cudaStream_t);
template cudaError_t launch_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientCudaArgs<__nv_bfloat16>&,
    const BlockSparseLinearWeightGradientPlan&, cudaStream_t);

}  // namespace fastprune
