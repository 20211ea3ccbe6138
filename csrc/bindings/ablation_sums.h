// Runs a kernel over the grid [span of samples][piece] and adds the spans' sums in order.
#pragma once

#include "../kernels/cross_entropy_pieces.h"
#include "parallel_kernel.h"
#include "tensor_checks.h"
#include "tensor_memory.h"

namespace fastprune {

// About what an exponential costs, with the sum it goes into.
constexpr int64_t kMultiplyAddsOfExponential = 20;

// kernel(args, begin, end, scratch) fills args.partial_sums; multiply_adds: those of all pieces for
// one sample.
template <class T, class Args, class Kernel>
Tensor sum_over_samples(Args& args, int64_t multiply_adds, int64_t scratch_size,
                        const Tensor& logits, const Kernel& kernel) {
  const Tensor delta_sum = torch::stable::new_zeros(logits, {args.num_pieces}, ScalarType::Double);
  if (args.logits.rows == 0 || args.num_pieces == 0) return delta_sum;
  args.span = samples_per_span(args.logits.rows, args.num_pieces);
  const int64_t spans = (args.logits.rows + args.span - 1) / args.span;
  const Tensor partial_sums =
      torch::stable::new_empty(logits, {spans, args.num_pieces}, ScalarType::Double);
  args.partial_sums = static_cast<double*>(partial_sums.mutable_data_ptr());
  parallel_kernel<T>(
      spans * args.num_pieces, args.logits.rows * multiply_adds, scratch_size,
      [&](int64_t begin, int64_t end, T* scratch) { kernel(args, begin, end, scratch); });
  auto* sums = static_cast<double*>(delta_sum.mutable_data_ptr());
  for (int64_t span = 0; span < spans; ++span) {
    for (int64_t m = 0; m < args.num_pieces; ++m) {
      sums[m] += args.partial_sums[span * args.num_pieces + m];
    }
  }
  return delta_sum;
}

}  // namespace fastprune
