// block_sparse_conv2d and its input gradient in float16, on the tensor cores.
#include "block_sparse_conv2d_kernels.cuh"

namespace fastprune {

FASTPRUNE_CONVOLUTION_KERNELS(block_sparse_conv2d_f16, __half, false)
FASTPRUNE_CONVOLUTION_KERNELS(block_sparse_conv2d_input_gradient_f16, __half, true)

ConvolutionKernel<__half> convolution_kernel(LinearTile tile, bool input_gradient, __half) {
  const auto& kernels = input_gradient ? block_sparse_conv2d_input_gradient_f16_kernels
                                       : block_sparse_conv2d_f16_kernels;
  return kernels[static_cast<int>(tile) - static_cast<int>(LinearTile::k64x64By16)];
}

}  // namespace fastprune
