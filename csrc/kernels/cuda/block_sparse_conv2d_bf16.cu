// block_sparse_conv2d and its input gradient in bfloat16, on the tensor cores.
#include "block_sparse_conv2d_kernels.cuh"

namespace fastprune {

FASTPRUNE_CONVOLUTION_KERNELS(block_sparse_conv2d_bf16, __nv_bfloat16, false)
FASTPRUNE_CONVOLUTION_KERNELS(block_sparse_conv2d_input_gradient_bf16, __nv_bfloat16, true)

ConvolutionKernel<__nv_bfloat16> convolution_kernel(LinearTile tile, bool input_gradient,
                                                    __nv_bfloat16) {
  const auto& kernels = input_gradient ? block_sparse_conv2d_input_gradient_bf16_kernels
                                       : block_sparse_conv2d_bf16_kernels;
  return kernels[static_cast<int>(tile) - static_cast<int>(LinearTile::k64x64By16)];
}

}  // namespace fastprune
