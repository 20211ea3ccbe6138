// The launch geometry of transposed_structure.cu.
#pragma once

#include <optional>

#include "launch_plan.h"

namespace fastprune {

constexpr int kStructureWarps = 8;
constexpr int kStructureThreads = 32 * kStructureWarps;

// One thread block for each block column, and one that writes the last offset; nothing where a grid
// holds fewer.
inline std::optional<LaunchPlan> plan_transposed_structure(int64_t block_cols) {
  if (block_cols < 0 || block_cols >= kMaxGridX) return std::nullopt;
  return LaunchPlan{"transposed_structure",
                    {static_cast<uint32_t>(block_cols + 1), 1, 1},
                    {kStructureThreads, 1, 1},
                    0};
}

}  // namespace fastprune
