#include <torch/csrc/stable/library.h>

#include <optional>

#include "../kernels/cpu/dispatch.h"
#include "ablation_checks.h"
#include "ablation_sums.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "ablated_cross_entropy";

template <class T>
Tensor run(const Tensor& logits, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
           const Tensor& pieces, const std::optional<Tensor>& sample_weight) {
  AblatedCrossEntropyArgs<T> args;
  args.logits = matrix_view<T>(logits);
  args.hidden = matrix_view<T>(hidden);
  args.weight = matrix_view<T>(weight);
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.sample_weight =
      sample_weight ? static_cast<const T*>(sample_weight->const_data_ptr()) : nullptr;
  args.pieces = static_cast<const int32_t*>(pieces.const_data_ptr());
  args.num_pieces = pieces.size(0);
  check_targets(kOp, args.targets, args.logits.rows, args.logits.cols);
  check_pieces(kOp, args.pieces, args.num_pieces, args.weight.rows, args.weight.cols);
  int64_t multiply_adds = 0;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* p = args.pieces + 4 * m;
    multiply_adds += int64_t{p[1] - p[0]} * (p[3] - p[2] + kMultiplyAddsOfExponential);
  }
  const auto& kernels = kernels_of<T>(cpu_kernels());
  return sum_over_samples<T>(args, multiply_adds, kernels.ablated_cross_entropy_scratch(args),
                             logits, kernels.ablated_cross_entropy);
}

Tensor ablated_cross_entropy_cpu(const Tensor& logits, const Tensor& hidden, const Tensor& weight,
                                 const Tensor& targets, const Tensor& pieces,
                                 const std::optional<Tensor>& sample_weight) {
  check_ablated_cross_entropy(kOp, logits, hidden, weight, targets, pieces, sample_weight);
  std::optional<Tensor> contiguous_weight;
  if (sample_weight) contiguous_weight = as_contiguous(*sample_weight);
  Tensor result;
  with_floating_type(kOp, "logits", logits, [&](auto zero) {
    result = run<decltype(zero)>(with_contiguous_columns(logits), with_contiguous_columns(hidden),
                                 with_contiguous_columns(weight), as_contiguous(targets),
                                 as_contiguous(pieces), contiguous_weight);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("ablated_cross_entropy", TORCH_BOX(&ablated_cross_entropy_cpu));
}

}  // namespace fastprune
