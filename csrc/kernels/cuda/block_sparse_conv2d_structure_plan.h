// The launch geometry of block_sparse_conv2d_structure.cu.
#pragma once

#include <optional>

#include "transposed_structure_plan.h"

namespace fastprune {

// One thread block for each list and tap; nothing where a grid holds fewer.
inline std::optional<LaunchPlan> plan_convolution_structure(int64_t lists, int64_t taps) {
  if (lists < 0 || taps < 1 || lists > kMaxGridX / taps) return std::nullopt;
  return LaunchPlan{"block_sparse_conv2d_structure",
                    {static_cast<uint32_t>(lists * taps), 1, 1},
                    {kStructureThreads, 1, 1},
                    0};
}

}  // namespace fastprune
