#pragma once

#include <cuda_runtime_api.h>

#include "../block_sparse_linear_weight_gradient.h"
#include "block_sparse_linear_weight_gradient_plan.h"

namespace fastprune {

// What the kernels take beside the contract's arguments.
template <class T>
struct BlockSparseLinearWeightGradientCudaArgs {
  BlockSparseLinearWeightGradientArgs<T> gradient;
  int64_t samples_per_slice;
  int64_t slices;
  int64_t size;         // elements of grad_values
  float* partial_sums;  // [slices][size], or null where there is one slice
};

// Queues the kernels of `plan` on `stream` and returns at once. T is float, __half or
// __nv_bfloat16.
template <class T>
cudaError_t launch_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientCudaArgs<T>& args,
    const BlockSparseLinearWeightGradientPlan& plan, cudaStream_t stream);

// Queues the kernel that adds the slices' sums, if the plan has one.
template <class T>
cudaError_t launch_weight_gradient_sum(const BlockSparseLinearWeightGradientCudaArgs<T>& args,
                                       const LaunchPlan& plan, cudaStream_t stream);

}  // namespace fastprune
