// block_sparse_conv2d and its input gradient in tf32, on the tensor cores.
#include "block_sparse_conv2d_kernels.cuh"

namespace fastprune {

FASTPRUNE_CONVOLUTION_KERNELS(block_sparse_conv2d_tf32, float, false)
FASTPRUNE_CONVOLUTION_KERNELS(block_sparse_conv2d_input_gradient_tf32, float, true)

ConvolutionKernel<float> convolution_kernel(LinearTile tile, bool input_gradient, float) {
  const auto& kernels = input_gradient ? block_sparse_conv2d_input_gradient_tf32_kernels
                                       : block_sparse_conv2d_tf32_kernels;
  return kernels[static_cast<int>(tile) - static_cast<int>(LinearTile::k64x64By16)];
}

}  // namespace fastprune
