#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "block_sparse_conv2d_plan.h"

namespace fastprune {

template <class T>
using ConvolutionKernel = void (*)(ConvolutionProductArgs<T>);

// Queues a product on `stream` and returns at once; its geometry is that of the plan.
template <class T>
cudaError_t launch_convolution(const ConvolutionProductArgs<T>& args, const ConvolutionPlan& plan,
                               bool input_gradient, cudaStream_t stream);

// The tensor-core kernel of a tile from k64x64By16 on, but kAny; float stands for tf32.
ConvolutionKernel<float> convolution_kernel(LinearTile tile, bool input_gradient, float);
ConvolutionKernel<__half> convolution_kernel(LinearTile tile, bool input_gradient, __half);
ConvolutionKernel<__nv_bfloat16> convolution_kernel(LinearTile tile, bool input_gradient,
                                                    __nv_bfloat16);

// The lists of the input gradient, made on the device: list l = g * channel_blocks + c holds the
// kept blocks of block c of group g's input channels, tap by tap in the order of tap_rank. Those of
// the tap at place r are the entries from offsets[l * taps + r] to offsets[l * taps + r + 1]; entry
// j is block blocks[j], and within a tap they are in the order of the block rows. sources[j] is
// (place of the tap within its class) * rows_per_group + block row within the group.
struct ConvolutionStructureArgs {
  const int32_t* crow_indices;  // [groups * rows_per_group + 1]
  const int32_t* col_indices;   // [kept], strictly increasing within a block row
  int32_t* offsets;             // [groups * channel_blocks * taps + 1]
  int32_t* sources;             // [kept]
  int32_t* blocks;              // [kept]
  TapClasses row_classes, column_classes;
  int32_t rows_per_group, channel_blocks, groups;
};

// Queues the kernel on `stream` and returns at once. cudaErrorInvalidConfiguration: more lists and
// taps than a grid holds thread blocks.
cudaError_t launch_convolution_structure(const ConvolutionStructureArgs& args, cudaStream_t stream);

}  // namespace fastprune
