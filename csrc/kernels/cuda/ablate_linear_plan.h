// The launch geometry of ablate_linear.cu; the tile picture is there.
#pragma once

#include <optional>

#include "launch_plan.h"

namespace fastprune {

constexpr int kAblateTile = 64;  // samples, and outputs
constexpr int kAblateColumns = 16;
constexpr int kAblateThreads = 256;

// Nothing where a size is out of range or there would be more thread blocks than a grid can hold.
// A grid of 0 thread blocks means an empty result, and must not be launched.
inline std::optional<LaunchPlan> plan_ablate_linear_cuda(int64_t samples, int64_t in_features,
                                                         int64_t out_features, int64_t num_pieces) {
  constexpr int64_t kMaxFeatures = 2147483647 - kAblateTile;  // the kernel counts them in int
  if (samples < 0 || in_features < 0 || in_features > kMaxFeatures || out_features < 0 ||
      out_features > kMaxFeatures || num_pieces < 0) {
    return std::nullopt;
  }
  const int64_t sample_tiles = samples / kAblateTile + (samples % kAblateTile != 0);
  const int64_t output_tiles = (out_features + kAblateTile - 1) / kAblateTile;
  uint32_t blocks = 0;
  if (sample_tiles > 0 && output_tiles > 0 && num_pieces > 0) {
    // Divisions, since the products may not fit.
    if (sample_tiles > kMaxGridX / output_tiles ||
        num_pieces > kMaxGridX / (sample_tiles * output_tiles)) {
      return std::nullopt;
    }
    blocks = static_cast<uint32_t>(sample_tiles * output_tiles * num_pieces);
  }
  return LaunchPlan{"ablate_linear_f32", {blocks, 1, 1}, {kAblateThreads, 1, 1}, 0};
}

}  // namespace fastprune
