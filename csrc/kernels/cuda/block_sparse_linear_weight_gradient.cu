// block_sparse_linear_weight_gradient on CUDA; the contract is in
// ../block_sparse_linear_weight_gradient.h. Two kernels compute it, each with its picture in a
// header of its own: on tensor cores, and by plain multiply-adds.
//
// Where few blocks are kept, the samples are cut into slices of equal length (a function of the
// sizes alone). Each slice stores its sums in float32, and a second kernel adds them in order: no
// atomics, and the same bits in every run.
#include "block_sparse_linear_weight_gradient.h"

#include "block_sparse_linear_weight_gradient_kernels.cuh"

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

#define FASTPRUNE_SUM(name, T)                                                       \
  extern "C" __global__ void __launch_bounds__(kGradientSumThreads)                  \
      block_sparse_linear_weight_gradient_##name(                                    \
          const __grid_constant__ BlockSparseLinearWeightGradientCudaArgs<T> args) { \
    add_slices(args);                                                                \
  }
FASTPRUNE_SUM(sum_f32, float)
FASTPRUNE_SUM(sum_f16, __half)
FASTPRUNE_SUM(sum_bf16, __nv_bfloat16)

FASTPRUNE_WEIGHT_GRADIENT_KERNELS(block_sparse_linear_weight_gradient, MatrixInput)

template <class T>
cudaError_t launch_weight_gradient_sum(const BlockSparseLinearWeightGradientCudaArgs<T>& args,
                                       const LaunchPlan& plan, cudaStream_t stream) {
  static const WeightGradientKernel kernels[] = {
      FASTPRUNE_KERNEL_ENTRY(block_sparse_linear_weight_gradient, , float, sum_f32)
          FASTPRUNE_KERNEL_ENTRY(block_sparse_linear_weight_gradient, , __half, sum_f16)
              FASTPRUNE_KERNEL_ENTRY(block_sparse_linear_weight_gradient, , __nv_bfloat16,
                                     sum_bf16)};
  if (plan.grid[0] == 0) return cudaSuccess;
  return launch_weight_gradient_kernel(kernels, plan, &args, stream);
}

template <class T>
cudaError_t launch_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientCudaArgs<T>& args,
    const BlockSparseLinearWeightGradientPlan& plan, cudaStream_t stream) {
  if (plan.product.grid[0] == 0) return cudaSuccess;
  const cudaError_t status = launch_weight_gradient_kernel(
      block_sparse_linear_weight_gradient_kernels, plan.product, &args, stream);
  return status == cudaSuccess ? launch_weight_gradient_sum(args, plan.sum, stream) : status;
}

#define FASTPRUNE_INSTANTIATE(T)                                                           \
  template cudaError_t launch_weight_gradient_sum(                                         \
      const BlockSparseLinearWeightGradientCudaArgs<T>&, const LaunchPlan&, cudaStream_t); \
  template cudaError_t launch_block_sparse_linear_weight_gradient(                         \
      const BlockSparseLinearWeightGradientCudaArgs<T>&,                                   \
      const BlockSparseLinearWeightGradientPlan&, cudaStream_t);

FASTPRUNE_INSTANTIATE(float)
FASTPRUNE_INSTANTIATE(__half)
FASTPRUNE_INSTANTIATE(__nv_bfloat16)

}  // namespace fastprune
