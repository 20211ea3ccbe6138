// Runs the convolution that block_sparse_conv2d's forward and its input gradient share.
#pragma once

#include "../kernels/cpu/dispatch.h"
#include "parallel_kernel.h"

namespace fastprune {

template <class T>
void convolve(const BlockConvolutionArgs<T>& args) {
  if (args.output.images == 0 || args.output.channels == 0) return;
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const auto& weight = args.weight;
  const BlockConvolutionWork work =
      kernels.plan_block_convolution(args, torch::stable::get_num_threads());
  const int64_t multiply_adds = args.output.images * args.output.height * args.output.width *
                                weight.outputs * weight.steps * weight.offsets[weight.lists];
  parallel_kernel<T>(work.total, multiply_adds, work.scratch_size,
                     [&](int64_t begin, int64_t end, T* scratch) {
                       kernels.block_convolution(args, work, begin, end, scratch);
                     });
}

}  // namespace fastprune
