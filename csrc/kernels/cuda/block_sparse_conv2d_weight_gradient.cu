// block_sparse_conv2d_weight_gradient on CUDA; the contract is in
// ../block_sparse_conv2d_weight_gradient.h. It is the linear layer's weight gradient over the
// output positions of all images, by the same kernels, slices and sums; their inputs are read
// where the taps say (block_sparse_conv2d_weight_gradient_operands.cuh).
#include "block_sparse_conv2d_weight_gradient.h"

#include "block_sparse_conv2d_weight_gradient_operands.cuh"
#include "block_sparse_linear_weight_gradient_kernels.cuh"

namespace fastprune {

FASTPRUNE_WEIGHT_GRADIENT_KERNELS(block_sparse_conv2d_weight_gradient, ImageInput)

template <class T>
cudaError_t launch_block_sparse_conv2d_weight_gradient(
    const BlockSparseConv2dWeightGradientCudaArgs<T>& args,
    const BlockSparseConv2dWeightGradientPlan& plan, cudaStream_t stream) {
  const BlockSparseLinearWeightGradientCudaArgs<T>& matrix_args = args;
  if (plan.pointwise) {
    return launch_block_sparse_linear_weight_gradient(matrix_args, plan.launch, stream);
  }
  if (plan.launch.product.grid[0] == 0) return cudaSuccess;
  const cudaError_t status = launch_weight_gradient_kernel(
      block_sparse_conv2d_weight_gradient_kernels, plan.launch.product, &args, stream);
  if (status != cudaSuccess) return status;
  return launch_weight_gradient_sum(matrix_args, plan.launch.sum, stream);
}

template cudaError_t launch_block_sparse_conv2d_weight_gradient(
    const BlockSparseConv2dWeightGradientCudaArgs<float>&,
    const BlockSparseConv2dWeightGradientPlan&, cudaStream_t);
template cudaError_t launch_block_sparse_conv2d_weight_gradient(
    const BlockSparseConv2dWeightGradientCudaArgs<__half>&,
    const BlockSparseConv2dWeightGradientPlan&, cudaStream_t);
template cudaError_t launch_block_sparse_conv2d_weight_gradient(
    const BlockSparseConv2dWeightGradientCudaArgs<__nv_bfloat16>&,
    const BlockSparseConv2dWeightGradientPlan&, cudaStream_t);

}  // namespace fastprune
