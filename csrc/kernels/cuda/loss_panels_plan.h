// The launch geometry of loss_panels.cu, and the sizes of what it makes.
#pragma once

#include <optional>

#include "launch_plan.h"

namespace fastprune {

// Samples that a warp computes at a time, four for each lane; rows of a panel are padded to them.
constexpr int kWarpSamples = 128;
// Neighbouring rows of a weight that one 16-byte load brings.
constexpr int kQuad = 4;

constexpr int kTransposeTile = 32;
constexpr int kTransposeThreads = 256;
constexpr int kSoftmaxThreads = 256;
constexpr int kSumThreads = 128;
// The kernels count classes, features and columns in int.
constexpr int64_t kMaxPanelSize = 2147483647 - kWarpSamples;

// At most kMaxGridX * kWarpSamples, so that no product of sizes in a plan overflows.
constexpr int64_t kMaxSamples = int64_t{kMaxGridX} * kWarpSamples;

#if defined(__CUDACC__)
#define FASTPRUNE_HOST_DEVICE __host__ __device__
#else
#define FASTPRUNE_HOST_DEVICE
#endif

FASTPRUNE_HOST_DEVICE constexpr int64_t padded_size(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// What a warp each computes of [span of samples][piece]: kLossWarps neighbouring pieces of one span
// share a thread block, and with it a cache.
struct LossGrid {
  int64_t span;  // samples, a multiple of kWarpSamples
  int64_t spans;
  int64_t blocks;
};

constexpr int kLossWarps = 4;

inline bool are_sizes(int64_t samples, int64_t first, int64_t second) {
  return samples >= 0 && samples <= kMaxSamples && first >= 0 && first <= kMaxPanelSize &&
         second >= 0 && second <= kMaxPanelSize;
}

// Nothing where there would be more thread blocks than a grid can hold. Depends on sizes alone, and
// so do the bits of the sums.
inline std::optional<LossGrid> plan_loss_grid(int64_t samples, int64_t num_pieces, int warps) {
  // Where pieces are many, a sum for each tile of samples would take more memory than the inputs.
  constexpr int64_t kLargestGrid = int64_t{1} << 20;
  if (samples < 0 || samples > kMaxSamples || num_pieces < 0 || num_pieces > kMaxPanelSize) {
    return std::nullopt;
  }
  const int64_t tiles = padded_size(samples, kWarpSamples) / kWarpSamples;
  if (tiles == 0 || num_pieces == 0) return LossGrid{kWarpSamples, 0, 0};
  const int64_t most_spans = num_pieces < kLargestGrid ? kLargestGrid / num_pieces : 1;
  const int64_t tiles_per_span = (tiles + most_spans - 1) / most_spans;
  const int64_t spans = (tiles + tiles_per_span - 1) / tiles_per_span;
  const int64_t groups = (num_pieces + warps - 1) / warps;
  return LossGrid{tiles_per_span * kWarpSamples, spans, spans * groups};
}

// matrix [rows, cols] to panel [cols][padded_size(rows, multiple)].
inline std::optional<LaunchPlan> plan_transpose_to_panel(int64_t rows, int64_t cols,
                                                         int64_t multiple) {
  if (!are_sizes(rows, cols, 0)) return std::nullopt;
  const int64_t row_tiles = (padded_size(rows, multiple) + kTransposeTile - 1) / kTransposeTile;
  const int64_t col_tiles = (cols + kTransposeTile - 1) / kTransposeTile;
  if (col_tiles > 0 && row_tiles > kMaxGridX / col_tiles) return std::nullopt;
  const auto tiles = static_cast<uint32_t>(row_tiles * col_tiles);
  return LaunchPlan{"transpose_to_panel_f32", {tiles, 1, 1}, {kTransposeThreads, 1, 1}, 0};
}

// One warp for each sample, the padded ones too.
inline std::optional<LaunchPlan> plan_softmax_panel(int64_t samples, int64_t classes) {
  if (!are_sizes(samples, classes, 0)) return std::nullopt;
  const int64_t blocks = padded_size(samples, kWarpSamples) / (kSoftmaxThreads / 32);
  if (blocks > kMaxGridX) return std::nullopt;
  const uint32_t grid = classes == 0 ? 0 : static_cast<uint32_t>(blocks);
  return LaunchPlan{"softmax_panel_f32", {grid, 1, 1}, {kSoftmaxThreads, 1, 1}, 0};
}

inline std::optional<LaunchPlan> plan_sum_spans(int64_t num_pieces) {
  if (!are_sizes(0, num_pieces, 0)) return std::nullopt;
  const auto blocks = static_cast<uint32_t>((num_pieces + kSumThreads - 1) / kSumThreads);
  return LaunchPlan{"sum_spans_f64", {blocks, 1, 1}, {kSumThreads, 1, 1}, 0};
}

}  // namespace fastprune
