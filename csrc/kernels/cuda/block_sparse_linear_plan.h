// Which kernel serves block_sparse_linear or its input gradient, and with what geometry.
#pragma once

#include <algorithm>
#include <optional>

#include "launch_plan.h"

namespace fastprune {

// What is multiplied: float by fused multiply-adds, the others on the tensor cores where the blocks
// allow it.
enum class LinearArithmetic : int32_t { kF32, kTf32, kF16, kBf16 };

// Samples x outputs of a thread block, and the outputs of a strip, which lies in one list of
// blocks. Narrow: for inputs whose rows do not begin and end at multiples of 16 bytes. kAny serves
// all blocks, without tensor cores (block_sparse_linear.cu).
enum class LinearTile : int32_t {
  kFewSamples,
  kFewSamplesNarrow,
  k64x64By16,
  k64x64By16Narrow,
  k256x64By16,
  k256x64By32,
  k256x64By64,
  kAny
};

// The product of ../block_product.h.
struct BlockProductShape {
  int64_t samples;
  int64_t inputs;
  int64_t outputs;
  int64_t block_steps;
  int64_t block_outputs;
  int64_t kept;  // blocks
  bool input_gradient;
  bool aligned_weights;     // they begin at a multiple of 16 bytes
  bool aligned_inputs;      // each of their rows begins and ends at one
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
constexpr int kTileRowBytes = 64;  // that a stage holds of each sample and output

template <int samples, int outputs, int strip, int warps, int stages>
struct TileShape {
  static constexpr int kSamples = samples, kOutputs = outputs, kStrip = strip, kWarps = warps;
  static constexpr int kThreads = 32 * warps;
  static constexpr int kStages = stages;
  static constexpr int kSharedBytes = stages * (samples + outputs) * kTileRowBytes;
};

// Large: 256 samples share the weights that are read for them, and 64 outputs the inputs; two of
// them on a multiprocessor, since eight warps alone wait for one another (twice as many outputs in
// one thread block took 1.2 times as long on an H200). Small: four of them on a multiprocessor,
// stages that hide latency.
template <int strip>
using LargeTile = TileShape<256, 64, strip, 8, 4>;
using SmallTile = TileShape<64, 64, 16, 4, 5>;

// few_samples.cuh
constexpr int kFewSamples = 16;
constexpr int kFewOutputs = 16;
constexpr int kFewWarps = 8;
constexpr int kFewRingBytes = 6144;  // of each warp

#define FASTPRUNE_TILE_NAMES(prefix)                                                   \
  {prefix "_few_samples",        prefix "_few_samples_narrow", prefix "_64x64_by_16",  \
   prefix "_64x64_by_16_narrow", prefix "_256x64_by_16",       prefix "_256x64_by_32", \
   prefix "_256x64_by_64"}

// By arithmetic (from kTf32 on), direction and tile.
constexpr const char* kTileKernels[3][2][7] = {
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

// Whether the tensor-core kernels take the blocks, and offsets of 32 bits reach all weights and all
// columns of the inputs.
inline bool tensor_cores_serve(const BlockProductShape& shape) {
  constexpr int64_t kMaxFeatures = 2147483647 - 256;
  constexpr int64_t kMaxWeights = 4294967296;
  return shape.aligned_weights && shape.block_outputs % 16 == 0 && shape.block_steps % 16 == 0 &&
         shape.block_outputs <= 128 && shape.block_steps <= 128 && shape.inputs <= kMaxFeatures &&
         shape.outputs <= kMaxFeatures &&
         shape.kept <= kMaxWeights / (shape.block_outputs * shape.block_steps);
}

// Up to how many samples the kernel of few of them is the fastest, several thread blocks for each
// strip of outputs: it keeps all multiprocessors busy, but each strip reads all inputs, which wide
// blocks share in the other tiles. Measured on an H200, 4096 x 4096, 50 to 90 %, bfloat16
// (benchmarks/gpu_benchmark.py).
constexpr int64_t most_few_samples(const BlockProductShape& shape) {
  return shape.block_outputs % 64 == 0 ? 32 : shape.block_outputs % 32 == 0 ? 64 : 128;
}

// The tile of more than a few samples. Small tiles, of the same bits, where large ones would leave
// half of the multiprocessors idle or hold samples that do not exist instead; and for narrow
// inputs, which are slow for another reason.
inline LinearTile tile_of_many(const BlockProductShape& shape) {
  using Large = LargeTile<16>;
  constexpr int kHalf = Large::kSamples / 2;
  // Two share a multiprocessor: as many as fill half of all were slower than small tiles.
  const int64_t output_tiles = tiles_of(shape.outputs, 2 * Large::kOutputs);
  if (!shape.aligned_inputs) return LinearTile::k64x64By16Narrow;
  if (shape.samples <= kHalf ||
      shape.samples / kHalf < tiles_of(shape.multiprocessors, std::max<int64_t>(output_tiles, 1))) {
    return LinearTile::k64x64By16;
  }
  return shape.block_outputs % 64 == 0   ? LinearTile::k256x64By64
         : shape.block_outputs % 32 == 0 ? LinearTile::k256x64By32
                                         : LinearTile::k256x64By16;
}

inline bool is_large(LinearTile tile) {
  return tile == LinearTile::k256x64By16 || tile == LinearTile::k256x64By32 ||
         tile == LinearTile::k256x64By64;
}

// How one of these tiles is launched.
inline std::optional<LaunchPlan> tile_launch(LinearTile tile, const char* kernel, int64_t samples,
                                             int64_t outputs) {
  const auto launch = [&](auto shape) -> std::optional<LaunchPlan> {
    using Shape = decltype(shape);
    const auto grid =
        thread_blocks(tiles_of(samples, Shape::kSamples), tiles_of(outputs, Shape::kOutputs));
    if (!grid) return std::nullopt;
    return LaunchPlan{kernel, {*grid, 1, 1}, {Shape::kThreads, 1, 1}, Shape::kSharedBytes};
  };
  return is_large(tile) ? launch(LargeTile<16>{}) : launch(SmallTile{});
}

// Nothing where a size is out of range, or where there would be more thread blocks than a grid
// can hold. A grid of 0 thread blocks means an empty output, and must not be launched.
inline std::optional<BlockProductPlan> plan_block_product(const BlockProductShape& shape,
                                                          LinearArithmetic arithmetic) {
  constexpr int64_t kMaxBlock = 2147483647;  // the kernels count within a block in int
  if (shape.samples < 0 || shape.inputs < 0 || shape.outputs < 0 || shape.kept < 0 ||
      shape.block_outputs < 1 || shape.block_outputs > kMaxBlock || shape.block_steps < 1 ||
      shape.block_steps > kMaxBlock) {
    return std::nullopt;
  }
  if (arithmetic == LinearArithmetic::kF32 || !tensor_cores_serve(shape)) {
    return plan_any_block_product(shape, arithmetic);
  }
  const auto kernel = [&](LinearTile tile) {
    return kTileKernels[static_cast<int>(arithmetic) - 1][shape.input_gradient]
                       [static_cast<int>(tile)];
  };
  if (shape.samples <= most_few_samples(shape)) {
    const LinearTile tile =
        shape.aligned_inputs ? LinearTile::kFewSamples : LinearTile::kFewSamplesNarrow;
    const auto grid =
        thread_blocks(tiles_of(shape.samples, kFewSamples), tiles_of(shape.outputs, kFewOutputs));
    if (!grid) return std::nullopt;
    return BlockProductPlan{
        {kernel(tile), {*grid, 1, 1}, {32 * kFewWarps, 1, 1}, kFewWarps * kFewRingBytes}, tile};
  }
  const LinearTile tile = tile_of_many(shape);
  const auto launch = tile_launch(tile, kernel(tile), shape.samples, shape.outputs);
  if (!launch) return std::nullopt;
  return BlockProductPlan{*launch, tile};
}

}  // namespace fastprune
