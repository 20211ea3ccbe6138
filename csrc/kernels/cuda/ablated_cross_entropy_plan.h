// The launch geometry of ablated_cross_entropy.cu; the plans of the panels are in
// loss_panels_plan.h.
#pragma once

#include "loss_panels_plan.h"

namespace fastprune {

struct AblatedCrossEntropyPlan {
  LaunchPlan launch;
  LossGrid grid;
};

// Nothing where a size is out of range. A grid of 0 thread blocks means no piece or no sample.
inline std::optional<AblatedCrossEntropyPlan> plan_ablated_cross_entropy_cuda(int64_t samples,
                                                                              int64_t features,
                                                                              int64_t classes,
                                                                              int64_t num_pieces) {
  const auto grid = plan_loss_grid(samples, num_pieces, kLossWarps);
  if (!grid || !are_sizes(samples, features, classes) || grid->blocks > kMaxGridX) {
    return std::nullopt;
  }
  const auto blocks = static_cast<uint32_t>(grid->blocks);
  return AblatedCrossEntropyPlan{
      {"ablated_cross_entropy_f32", {blocks, 1, 1}, {kLossWarps * 32, 1, 1}, 0}, *grid};
}

}  // namespace fastprune
