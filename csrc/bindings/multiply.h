// Runs the product that block_sparse_linear's forward, its input gradient and convolutions of one
// pixel share.
#pragma once

#include "../kernels/cpu/dispatch.h"
#include "parallel_kernel.h"

namespace fastprune {

template <class T>
void multiply(const BlockProductArgs<T>& args) {
  if (args.input.rows == 0 || args.output.cols == 0) return;
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const auto& weight = args.weight;
  const BlockProductWork work = kernels.plan_block_product(args, torch::stable::get_num_threads());
  const int64_t multiply_adds =
      args.input.rows * weight.outputs * weight.steps * weight.offsets[weight.lists];
  parallel_kernel<T>(work.total, multiply_adds, work.scratch_size,
                     [&](int64_t begin, int64_t end, T* scratch) {
                       kernels.block_product(args, work, begin, end, scratch);
                     });
}

// The same for few samples and weights of 16 bits.
template <class W>
void multiply_few_samples(const MixedBlockProductArgs<float, W>& args) {
  if (args.input.rows == 0 || args.output.cols == 0) return;
  const auto multiply_range = few_samples_product_of<W>(cpu_kernels());
  const auto& weight = args.weight;
  const int64_t multiply_adds =
      args.input.rows * weight.outputs * weight.steps * weight.offsets[weight.lists];
  parallel_kernel<float>(
      few_samples_work(weight), multiply_adds, /*scratch_size=*/0,
      [&](int64_t begin, int64_t end, float*) { multiply_range(args, begin, end); });
}

}  // namespace fastprune
