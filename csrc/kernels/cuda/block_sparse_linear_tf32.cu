// block_sparse_linear and its input gradient of float tensors through tf32, on the tensor cores.
#include "block_product_kernels.cuh"

namespace fastprune {

FASTPRUNE_BLOCK_PRODUCT_KERNELS(block_sparse_linear_tf32, float, false)
FASTPRUNE_BLOCK_PRODUCT_KERNELS(block_sparse_linear_input_gradient_tf32, float, true)

BlockProductKernel<float> tile_kernel(LinearTile tile, bool input_gradient, float) {
  const auto& kernels = input_gradient ? block_sparse_linear_input_gradient_tf32_kernels
                                       : block_sparse_linear_tf32_kernels;
  return kernels[static_cast<int>(tile)];
}

}  // namespace fastprune
