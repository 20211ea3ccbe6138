#include "../kernels/cuda/ablated_cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/ablated_cross_entropy_plan.h"
#include "ablation_checks.h"
#include "cuda_stream.h"
#include "loss_panels_cuda.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "ablated_cross_entropy";

// Targets and pieces are not read here: that would make the host wait for the device. Those out of
// range give NaN.
Tensor ablated_cross_entropy_cuda(const Tensor& logits, const Tensor& hidden, const Tensor& weight,
                                  const Tensor& targets, const Tensor& pieces,
                                  const std::optional<Tensor>& sample_weight) {
  check_ablated_cross_entropy(kOp, logits, hidden, weight, targets, pieces, sample_weight);
  check_float_on_cuda(kOp, "logits", logits);
  const auto guard = device_guard(logits);
  const Tensor outputs = with_contiguous_columns(logits), inputs = with_contiguous_columns(hidden);
  const Tensor weights = with_contiguous_columns(weight), labels = as_contiguous(targets);
  const Tensor rectangles = as_contiguous(pieces);
  std::optional<Tensor> factors;
  if (sample_weight) factors = as_contiguous(*sample_weight);

  const int64_t samples = logits.size(0), num_pieces = pieces.size(0);
  const auto plan =
      plan_ablated_cross_entropy_cuda(samples, hidden.size(1), logits.size(1), num_pieces);
  const int64_t spans = plan ? plan->grid.spans : 0;
  const Tensor probability = empty_panel(outputs, kWarpSamples);
  const Tensor hidden_panel = empty_panel(inputs, kWarpSamples);
  const Tensor weight_panel = empty_panel(weights, kQuad);
  const Tensor log_sum_exp = empty_doubles(logits, {samples});
  const Tensor partial_sums = empty_doubles(logits, {spans, num_pieces});
  const Tensor delta_sum = torch::stable::new_zeros(logits, {num_pieces}, ScalarType::Double);

  AblatedCrossEntropyCudaArgs args = {};
  args.call.logits = matrix_view<float>(outputs);
  args.call.hidden = matrix_view<float>(inputs);
  args.call.weight = matrix_view<float>(weights);
  args.call.targets = static_cast<const int64_t*>(labels.const_data_ptr());
  args.call.sample_weight =
      factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr;
  args.call.pieces = static_cast<const int32_t*>(rectangles.const_data_ptr());
  args.call.num_pieces = num_pieces;
  args.call.span = plan ? plan->grid.span : 0;
  args.call.partial_sums = data_of<double>(partial_sums);
  args.probability = data_of<float>(probability);
  args.log_sum_exp = data_of<double>(log_sum_exp);
  args.hidden_panel = data_of<float>(hidden_panel);
  args.weight_panel = data_of<float>(weight_panel);
  args.delta_sum = data_of<double>(delta_sum);
  check_launch(launch_ablated_cross_entropy(args, current_stream(logits)),
               "ablated_cross_entropy_f32", logits, "logits ", logits, ", hidden ", hidden,
               ", pieces ", pieces);
  return delta_sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("ablated_cross_entropy", TORCH_BOX(&ablated_cross_entropy_cuda));
}

}  // namespace fastprune
