#pragma once

#include "block_sparse_conv2d_weight_gradient_plan.h"
#include "block_sparse_linear_weight_gradient.h"

namespace fastprune {

// What the kernels take. `gradient.input` is [output positions, channels of a group], whose
// row_stride is the channels of a pixel: where a position's row lies, `positions` tells.
// `gradient.grad_output` is [output positions, out_channels].
template <class T>
struct BlockSparseConv2dWeightGradientCudaArgs : BlockSparseLinearWeightGradientCudaArgs<T> {
  ConvolutionPositions positions;
  int32_t channel_blocks;  // of a tap
  int32_t group_outputs;   // output channels of a group
  uint32_t pixel_bytes;    // all channels of a pixel
};

// Queues the kernels of `plan` on `stream` and returns at once. T is float, __half or
// __nv_bfloat16.
template <class T>
cudaError_t launch_block_sparse_conv2d_weight_gradient(
    const BlockSparseConv2dWeightGradientCudaArgs<T>& args,
    const BlockSparseConv2dWeightGradientPlan& plan, cudaStream_t stream);

}  // namespace fastprune
