#include <torch/csrc/stable/library.h>

#include <optional>

#include "../kernels/cpu/dispatch.h"
#include "ablation_checks.h"
#include "ablation_sums.h"
#include "activation_names.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "ablated_mlp_cross_entropy";

template <class T>
Tensor run(const Tensor& logits, const Tensor& input, const Tensor& pre_activation,
           const Tensor& first_weight, const Tensor& second_weight, const Tensor& targets,
           const Tensor& pieces, Activation activation,
           const std::optional<Tensor>& sample_weight) {
  AblatedMlpCrossEntropyArgs<T> args;
  args.logits = matrix_view<T>(logits);
  args.input = matrix_view<T>(input);
  args.pre_activation = matrix_view<T>(pre_activation);
  args.first_weight = matrix_view<T>(first_weight);
  args.second_weight = matrix_view<T>(second_weight);
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.sample_weight =
      sample_weight ? static_cast<const T*>(sample_weight->const_data_ptr()) : nullptr;
  args.pieces = static_cast<const int32_t*>(pieces.const_data_ptr());
  args.num_pieces = pieces.size(0);
  args.activation = activation;
  const int64_t classes = args.logits.cols;
  check_targets(kOp, args.targets, args.logits.rows, classes);
  check_pieces(kOp, args.pieces, args.num_pieces, args.first_weight.rows, args.first_weight.cols);
  int64_t multiply_adds = 0;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* p = args.pieces + 4 * m;
    const int64_t rows = p[1] - p[0], cols = p[3] - p[2];
    multiply_adds += rows * (cols + classes) + kMultiplyAddsOfExponential * classes;
  }
  const auto& kernels = kernels_of<T>(cpu_kernels());
  return sum_over_samples<T>(args, multiply_adds, kernels.ablated_mlp_cross_entropy_scratch(args),
                             logits, kernels.ablated_mlp_cross_entropy);
}

Tensor ablated_mlp_cross_entropy_cpu(const Tensor& logits, const Tensor& input,
                                     const Tensor& pre_activation, const Tensor& first_weight,
                                     const Tensor& second_weight, const Tensor& targets,
                                     const Tensor& pieces, const std::string& activation_name,
                                     const std::optional<Tensor>& sample_weight) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_ablated_mlp_cross_entropy(kOp, logits, input, pre_activation, first_weight, second_weight,
                                  targets, pieces, sample_weight);
  std::optional<Tensor> contiguous_weight;
  if (sample_weight) contiguous_weight = as_contiguous(*sample_weight);
  Tensor result;
  with_floating_type(kOp, "logits", logits, [&](auto zero) {
    result = run<decltype(zero)>(with_contiguous_columns(logits), with_contiguous_columns(input),
                                 with_contiguous_columns(pre_activation),
                                 with_contiguous_columns(first_weight),
                                 with_contiguous_columns(second_weight), as_contiguous(targets),
                                 as_contiguous(pieces), activation, contiguous_weight);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("ablated_mlp_cross_entropy", TORCH_BOX(&ablated_mlp_cross_entropy_cpu));
}

}  // namespace fastprune
