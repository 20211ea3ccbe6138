// block_sparse_linear and its input gradient in bfloat16, on the tensor cores.
#include "block_product_kernels.cuh"

namespace fastprune {

FASTPRUNE_BLOCK_PRODUCT_KERNELS(block_sparse_linear_bf16, __nv_bfloat16, false)
FASTPRUNE_BLOCK_PRODUCT_KERNELS(block_sparse_linear_input_gradient_bf16, __nv_bfloat16, true)

BlockProductKernel<__nv_bfloat16> tile_kernel(LinearTile tile, bool input_gradient, __nv_bfloat16) {
  const auto& kernels = input_gradient ? block_sparse_linear_input_gradient_bf16_kernels
                                       : block_sparse_linear_bf16_kernels;
  return kernels[static_cast<int>(tile)];
}

}  // namespace fastprune
