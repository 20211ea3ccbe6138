// The launch geometry of ablated_mlp_cross_entropy.cu; the plans of the panels are in
// loss_panels_plan.h.
#pragma once

#include "loss_panels_plan.h"

namespace fastprune {

struct AblatedMlpCrossEntropyShape {
  int64_t samples;
  int64_t in_features;
  int64_t hidden;
  int64_t classes;
  int64_t num_pieces;
  int32_t activation;  // an Activation of types.h
};

struct AblatedMlpCrossEntropyPlan {
  LaunchPlan launch;
  LossGrid grid;
};

// A warp keeps values of its 128 samples in shared memory, 16 KiB: those of up to kMlpSlots hidden
// units, or of kMlpChunkUnits and of kMlpPanelClasses classes.
constexpr int kMlpWarps = 2;
constexpr int kMlpSlots = 32;
constexpr int kMlpPanelClasses = 16;
constexpr int kMlpChunkUnits = kMlpSlots - kMlpPanelClasses;

// Nothing where a size is out of range. A grid of 0 thread blocks means no piece or no sample.
inline std::optional<AblatedMlpCrossEntropyPlan> plan_ablated_mlp_cross_entropy_cuda(
    const AblatedMlpCrossEntropyShape& shape) {
  static constexpr const char* kKernels[] = {
      "ablated_mlp_cross_entropy_none_f32", "ablated_mlp_cross_entropy_relu_f32",
      "ablated_mlp_cross_entropy_gelu_f32", "ablated_mlp_cross_entropy_gelu_tanh_f32",
      "ablated_mlp_cross_entropy_silu_f32"};
  const auto grid = plan_loss_grid(shape.samples, shape.num_pieces, kMlpWarps);
  if (!grid || !are_sizes(shape.samples, shape.in_features, shape.hidden) ||
      !are_sizes(0, shape.classes, 0) || grid->blocks > kMaxGridX || shape.activation < 0 ||
      shape.activation > 4) {
    return std::nullopt;
  }
  const auto blocks = static_cast<uint32_t>(grid->blocks);
  return AblatedMlpCrossEntropyPlan{
      {kKernels[shape.activation], {blocks, 1, 1}, {kMlpWarps * 32, 1, 1}, 0}, *grid};
}

}  // namespace fastprune
