#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "../block_product.h"
#include "block_sparse_linear_plan.h"

namespace fastprune {

// Queues the product on `stream` and returns at once; `kept` blocks in all. `kernel` becomes the
// name of the kernel, for errors. cudaErrorInvalidConfiguration: more thread blocks than one grid
// holds.
cudaError_t launch_block_product(const BlockProductArgs<float>& args, int64_t kept, bool allow_tf32,
                                 bool input_gradient, cudaStream_t stream, const char** kernel);
cudaError_t launch_block_product(const BlockProductArgs<__half>& args, int64_t kept,
                                 bool input_gradient, cudaStream_t stream, const char** kernel);
cudaError_t launch_block_product(const BlockProductArgs<__nv_bfloat16>& args, int64_t kept,
                                 bool input_gradient, cudaStream_t stream, const char** kernel);

template <class T>
using BlockProductKernel = void (*)(BlockProductArgs<T>);

// The tensor-core kernel of a tile other than kAny; float stands for tf32.
BlockProductKernel<float> tile_kernel(LinearTile tile, bool input_gradient, float);
BlockProductKernel<__half> tile_kernel(LinearTile tile, bool input_gradient, __half);
BlockProductKernel<__nv_bfloat16> tile_kernel(LinearTile tile, bool input_gradient, __nv_bfloat16);

}  // namespace fastprune
