#include "../kernels/cuda/ablated_mlp_cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/ablated_mlp_cross_entropy_plan.h"
#include "ablation_checks.h"
#include "activation_names.h"
#include "cuda_stream.h"
#include "loss_panels_cuda.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "ablated_mlp_cross_entropy";

// Targets and pieces are not read here: that would make the host wait for the device. Those out of
// range give NaN.
Tensor ablated_mlp_cross_entropy_cuda(const Tensor& logits, const Tensor& input,
                                      const Tensor& pre_activation, const Tensor& first_weight,
                                      const Tensor& second_weight, const Tensor& targets,
                                      const Tensor& pieces, const std::string& activation_name,
                                      const std::optional<Tensor>& sample_weight) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_ablated_mlp_cross_entropy(kOp, logits, input, pre_activation, first_weight, second_weight,
                                  targets, pieces, sample_weight);
  check_float_on_cuda(kOp, "logits", logits);
  const auto guard = device_guard(logits);
  const Tensor outputs = with_contiguous_columns(logits), inputs = with_contiguous_columns(input);
  const Tensor before = with_contiguous_columns(pre_activation);
  const Tensor first = with_contiguous_columns(first_weight);
  const Tensor second = with_contiguous_columns(second_weight);
  const Tensor labels = as_contiguous(targets), rectangles = as_contiguous(pieces);
  std::optional<Tensor> factors;
  if (sample_weight) factors = as_contiguous(*sample_weight);

  const int64_t samples = logits.size(0), num_pieces = pieces.size(0);
  const auto plan = plan_ablated_mlp_cross_entropy_cuda(
      {samples, input.size(1), pre_activation.size(1), logits.size(1), num_pieces,
       static_cast<int32_t>(activation)});
  const int64_t spans = plan ? plan->grid.spans : 0;
  const Tensor probability = empty_panel(outputs, kWarpSamples);
  const Tensor input_panel = empty_panel(inputs, kWarpSamples);
  const Tensor pre_activation_panel = empty_panel(before, kWarpSamples);
  const Tensor first_weight_panel = empty_panel(first, kQuad);
  const Tensor second_weight_panel = empty_panel(second, kQuad);
  const Tensor log_sum_exp = empty_doubles(logits, {samples});
  const Tensor partial_sums = empty_doubles(logits, {spans, num_pieces});
  const Tensor delta_sum = torch::stable::new_zeros(logits, {num_pieces}, ScalarType::Double);

  AblatedMlpCrossEntropyCudaArgs args = {};
  args.call.logits = matrix_view<float>(outputs);
  args.call.input = matrix_view<float>(inputs);
  args.call.pre_activation = matrix_view<float>(before);
  args.call.first_weight = matrix_view<float>(first);
  args.call.second_weight = matrix_view<float>(second);
  args.call.targets = static_cast<const int64_t*>(labels.const_data_ptr());
  args.call.sample_weight =
      factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr;
  args.call.pieces = static_cast<const int32_t*>(rectangles.const_data_ptr());
  args.call.num_pieces = num_pieces;
  args.call.activation = activation;
  args.call.span = plan ? plan->grid.span : 0;
  args.call.partial_sums = data_of<double>(partial_sums);
  args.probability = data_of<float>(probability);
  args.log_sum_exp = data_of<double>(log_sum_exp);
  args.input_panel = data_of<float>(input_panel);
  args.pre_activation_panel = data_of<float>(pre_activation_panel);
  args.first_weight_panel = data_of<float>(first_weight_panel);
  args.second_weight_panel = data_of<float>(second_weight_panel);
  args.delta_sum = data_of<double>(delta_sum);
  check_launch(launch_ablated_mlp_cross_entropy(args, current_stream(logits)),
               plan ? plan->launch.kernel : kOp, logits, "logits ", logits, ", input ", input,
               ", first_weight ", first_weight, ", pieces ", pieces);
  return delta_sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("ablated_mlp_cross_entropy", TORCH_BOX(&ablated_mlp_cross_entropy_cuda));
}

}  // namespace fastprune
