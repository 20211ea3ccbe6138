// The launch geometry of block_sparse_linear.cu; the tile picture is there.
#pragma once

#include <optional>

#include "launch_plan.h"

namespace fastprune {

struct BlockSparseLinearShape {
  int64_t samples;
  int64_t in_features;
  int64_t out_features;
  int64_t rows;  // of a block
  int64_t cols;
};

constexpr int kLinearTileSamples = 64;
constexpr int kLinearTileRows = 16;
constexpr int kLinearThreads = 128;

// Nothing where a size is out of range or there would be more thread blocks than a grid can hold.
// A grid of 0 thread blocks means an empty output, and must not be launched.
inline std::optional<LaunchPlan> plan_block_sparse_linear_cuda(
    const BlockSparseLinearShape& shape) {
  constexpr int64_t kMaxBlock = 2147483647;  // the kernel counts within a block in int
  if (shape.samples < 0 || shape.in_features < 0 || shape.out_features < 0 || shape.rows < 1 ||
      shape.rows > kMaxBlock || shape.cols < 1 || shape.cols > kMaxBlock) {
    return std::nullopt;
  }
  const int64_t sample_tiles =
      shape.samples / kLinearTileSamples + (shape.samples % kLinearTileSamples != 0);
  const int64_t block_rows =
      shape.out_features / shape.rows + (shape.out_features % shape.rows != 0);
  // A thread block never crosses block rows, whose kept blocks differ.
  const int64_t row_tiles = (shape.rows + kLinearTileRows - 1) / kLinearTileRows;
  // Divisions, since the products may not fit.
  if (block_rows > kMaxGridX / row_tiles) return std::nullopt;
  const int64_t output_tiles = block_rows * row_tiles;
  if (output_tiles > 0 && sample_tiles > kMaxGridX / output_tiles) return std::nullopt;
  const auto tiles = static_cast<uint32_t>(sample_tiles * output_tiles);
  return LaunchPlan{"block_sparse_linear_f32", {tiles, 1, 1}, {kLinearThreads, 1, 1}, 0};
}

}  // namespace fastprune
