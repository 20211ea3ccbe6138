// Which kernel serves block_sparse_linear or its input gradient, and with what geometry.
#pragma once

#include <algorithm>
#include <optional>

#include "launch_plan.h"

namespace fastprune {

// What is multiplied: float by fused multiply-adds, the others on the tensor cores where the blocks
// allow it.
enum class LinearArithmetic : int32_t { kF32, kTf32, kF16, kBf16 };

// Outputs x samples of a thread block, and the outputs of a strip, which lies in one list of
// blocks. kAny serves all blocks, without tensor cores (block_sparse_linear.cu).
enum class LinearTile : int32_t {
  kFewSamples,
  k64x64By16,
  k128x128By16,
  k128x128By32,
  k128x128By64,
  kAny
};

// The product of ../block_product.h.
struct BlockProductShape {
  int64_t samples;
  int64_t inputs;
  int64_t outputs;
  int64_t block_steps;
  int64_t block_outputs;
  bool input_gradient;
  bool aligned;             // the weights begin at a multiple of 16 bytes
  int64_t multiprocessors;  // of the device
};

struct BlockProductPlan {
  LaunchPlan launch;
  LinearTile tile;
};

// block_sparse_linear.cu
constexpr int kLinearTileSamples = 64;
constexpr int kLinearTileOutputs = 16;
constexpr int kLinearThreads = 128;

// block_product.cuh
constexpr int kTileWarps = 4;
constexpr int kTileThreads = 32 * kTileWarps;
constexpr int kTileStages = 3;
constexpr int kTileRowBytes = 64;  // that a stage holds of each sample and output

// few_samples.cuh
constexpr int kFewSamples = 16;
constexpr int kFewOutputs = 16;
constexpr int kFewWarps = 8;
constexpr int kFewRingBytes = 6144;  // of each warp

#define FASTPRUNE_TILE_NAMES(prefix)                                                               \
  {prefix "_few_samples", prefix "_64x64_by_16", prefix "_128x128_by_16", prefix "_128x128_by_32", \
   prefix "_128x128_by_64"}

// By arithmetic (from kTf32 on), direction and tile.
constexpr const char* kTileKernels[3][2][5] = {
    {FASTPRUNE_TILE_NAMES("block_sparse_linear_tf32"),
     FASTPRUNE_TILE_NAMES("block_sparse_linear_input_gradient_tf32")},
    {FASTPRUNE_TILE_NAMES("block_sparse_linear_f16"),
     FASTPRUNE_TILE_NAMES("block_sparse_linear_input_gradient_f16")},
    {FASTPRUNE_TILE_NAMES("block_sparse_linear_bf16"),
     FASTPRUNE_TILE_NAMES("block_sparse_linear_input_gradient_bf16")}};
#undef FASTPRUNE_TILE_NAMES

constexpr const char* kAnyKernels[] = {"block_sparse_linear_f32", "block_sparse_linear_f32",
                                       "block_sparse_linear_f16", "block_sparse_linear_bf16"};

// The number of thread blocks, or nothing where a grid holds fewer.
inline std::optional<uint32_t> thread_blocks(int64_t sample_tiles, int64_t output_tiles) {
  // A division, since the product may not fit.
  if (output_tiles > kMaxGridX || (output_tiles > 0 && sample_tiles > kMaxGridX / output_tiles)) {
    return std::nullopt;
  }
  return static_cast<uint32_t>(sample_tiles * output_tiles);
}

inline int64_t tiles_of(int64_t size, int64_t tile) { return size / tile + (size % tile != 0); }

inline std::optional<BlockProductPlan> plan_any_block_product(const BlockProductShape& shape,
                                                              LinearArithmetic arithmetic) {
  // A thread block never crosses lists, whose kept blocks differ.
  const int64_t list_tiles = tiles_of(shape.block_outputs, kLinearTileOutputs);
  const int64_t lists = tiles_of(shape.outputs, shape.block_outputs);
  if (lists > kMaxGridX / list_tiles) return std::nullopt;
  const auto grid = thread_blocks(tiles_of(shape.samples, kLinearTileSamples), lists * list_tiles);
  if (!grid) return std::nullopt;
  return BlockProductPlan{
      {kAnyKernels[static_cast<int>(arithmetic)], {*grid, 1, 1}, {kLinearThreads, 1, 1}, 0},
      LinearTile::kAny};
}

// Nothing where a size is out of range, or where there would be more thread blocks than a grid
// can hold. A grid of 0 thread blocks means an empty output, and must not be launched.
inline std::optional<BlockProductPlan> plan_block_product(const BlockProductShape& shape,
                                                          LinearArithmetic arithmetic) {
  constexpr int64_t kMaxBlock = 2147483647;  // the kernels count within a block in int
  if (shape.samples < 0 || shape.inputs < 0 || shape.outputs < 0 || shape.block_outputs < 1 ||
      shape.block_outputs > kMaxBlock || shape.block_steps < 1 || shape.block_steps > kMaxBlock) {
    return std::nullopt;
  }
  if (arithmetic == LinearArithmetic::kF32 || !shape.aligned || shape.block_outputs % 16 != 0 ||
      shape.block_steps % 16 != 0 || shape.block_outputs > 128 || shape.block_steps > 128) {
    return plan_any_block_product(shape, arithmetic);
  }
  const auto plan = [&](LinearTile tile, std::optional<uint32_t> grid, int threads,
                        int shared_bytes) -> std::optional<BlockProductPlan> {
    if (!grid) return std::nullopt;
    const char* name = kTileKernels[static_cast<int>(arithmetic) - 1][shape.input_gradient]
                                   [static_cast<int>(tile)];
    return BlockProductPlan{{name,
                             {*grid, 1, 1},
                             {static_cast<uint32_t>(threads), 1, 1},
                             static_cast<uint32_t>(shared_bytes)},
                            tile};
  };
  // Strips end where lists do: up to 7 of them may lie past the last output.
  const int64_t strips = tiles_of(shape.outputs, 16);
  if (shape.samples <= kFewSamples) {
    return plan(LinearTile::kFewSamples, thread_blocks(shape.samples > 0, strips), 32 * kFewWarps,
                kFewWarps * kFewRingBytes);
  }
  const auto large = thread_blocks(tiles_of(shape.samples, 128), tiles_of(shape.outputs, 128));
  // Tiles of 64 x 64, of the same bits, where there would be less than one for each multiprocessor.
  if (!large || *large >= shape.multiprocessors) {
    const LinearTile tile = shape.block_outputs % 64 == 0   ? LinearTile::k128x128By64
                            : shape.block_outputs % 32 == 0 ? LinearTile::k128x128By32
                                                            : LinearTile::k128x128By16;
    return plan(tile, large, kTileThreads, kTileStages * 256 * kTileRowBytes);
  }
  return plan(LinearTile::k64x64By16,
              thread_blocks(tiles_of(shape.samples, 64), tiles_of(shape.outputs, 64)), kTileThreads,
              kTileStages * 128 * kTileRowBytes);
}

}  // namespace fastprune
