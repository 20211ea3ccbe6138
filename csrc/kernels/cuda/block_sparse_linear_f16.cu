// block_sparse_linear and its input gradient in float16, on the tensor cores.
#include "block_product_kernels.cuh"

namespace fastprune {

FASTPRUNE_BLOCK_PRODUCT_KERNELS(block_sparse_linear_f16, __half, false)
FASTPRUNE_BLOCK_PRODUCT_KERNELS(block_sparse_linear_input_gradient_f16, __half, true)

BlockProductKernel<__half> tile_kernel(LinearTile tile, bool input_gradient, __half) {
  const auto& kernels = input_gradient ? block_sparse_linear_input_gradient_f16_kernels
                                       : block_sparse_linear_f16_kernels;
  return kernels[static_cast<int>(tile)];
}

}  // namespace fastprune
