// The launch geometry of block_sparse_linear_weight_gradient.cu; the tile pictures are in the two
// headers of its kernels.
#pragma once

#include <optional>

#include "launch_plan.h"

namespace fastprune {

struct BlockSparseLinearWeightGradientShape {
  int64_t samples;
  int64_t in_features;
  int64_t out_features;
  int64_t rows;  // of a block
  int64_t cols;
  int64_t kept;
};

enum class WeightGradientType { kFloat32, kFloat16, kBfloat16 };

struct BlockSparseLinearWeightGradientPlan {
  LaunchPlan product;  // gridDim is (tiles of columns, tiles of rows, slices)
  LaunchPlan sum;      // of the slices; no thread blocks where there is one slice
  int64_t slices;
  int64_t samples_per_slice;
};

constexpr int kGradientTileColumns = 128;
constexpr int kGradientThreads = 128;
constexpr int kGradientSumThreads = 256;
constexpr int kGradientStageBytes = 64;  // of each column and row: 32 samples of 16 bits
// A slice is a whole number of stages, and of the plain kernel's steps.
constexpr int64_t kGradientSliceUnit = 32;
// Fewer samples would spend their time filling the pipeline; more would be a long float32 sum.
constexpr int64_t kGradientMinSlice = 256;
constexpr int64_t kGradientMaxSlice = int64_t{1} << 20;
// Slices are added until there are so many thread blocks, about two waves of a large GPU. A fixed
// number: the bits of the result must not depend on the device's size.
constexpr int64_t kGradientThreadBlocks = 512;

template <int kTileRows>
constexpr int kGradientStages = kTileRows == 128 ? 3 : 4;

// 48 KiB at most, which needs no opt-in.
template <int kTileRows>
constexpr int kGradientSharedBytes =
    kGradientStages<kTileRows> * kGradientStageBytes * (kGradientTileColumns + kTileRows);

// By type, as WeightGradientType counts them.
struct WeightGradientNames {
  const char* plain[3][2];            // by tile
  const char* tensor_cores[3][2][4];  // by alignment, then by tile
};

#define FASTPRUNE_PLAIN(op, type) {#op "_plain_" #type "_16", #op "_plain_" #type "_64"}
#define FASTPRUNE_TILES(op, type, suffix)                                              \
  {#op "_" #type "_16" suffix, #op "_" #type "_32" suffix, #op "_" #type "_64" suffix, \
   #op "_" #type "_128" suffix}
#define FASTPRUNE_TENSOR_CORES(op, type) \
  {FASTPRUNE_TILES(op, type, ""), FASTPRUNE_TILES(op, type, "_narrow")}
#define FASTPRUNE_WEIGHT_GRADIENT_NAMES(op)                                            \
  {                                                                                    \
    {FASTPRUNE_PLAIN(op, f32), FASTPRUNE_PLAIN(op, f16), FASTPRUNE_PLAIN(op, bf16)}, { \
      FASTPRUNE_TENSOR_CORES(op, tf32), FASTPRUNE_TENSOR_CORES(op, f16),               \
          FASTPRUNE_TENSOR_CORES(op, bf16)                                             \
    }                                                                                  \
  }

namespace weight_gradient_plan {

constexpr WeightGradientNames kLinear =
    FASTPRUNE_WEIGHT_GRADIENT_NAMES(block_sparse_linear_weight_gradient);

// By tile.
constexpr uint32_t kSharedBytes[4] = {kGradientSharedBytes<16>, kGradientSharedBytes<32>,
                                      kGradientSharedBytes<64>, kGradientSharedBytes<128>};

constexpr const char* kSum[3] = {"block_sparse_linear_weight_gradient_sum_f32",
                                 "block_sparse_linear_weight_gradient_sum_f16",
                                 "block_sparse_linear_weight_gradient_sum_bf16"};

constexpr int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace weight_gradient_plan

// Whether blocks are whole fragments of the tensor cores, and the type's products are theirs.
constexpr bool takes_tensor_cores(int64_t rows, int64_t cols, WeightGradientType type,
                                  bool allow_tf32) {
  return rows % 16 == 0 && cols % 16 == 0 && (type != WeightGradientType::kFloat32 || allow_tf32);
}

// `aligned`: every row of both operands begins and ends at a multiple of 16 bytes. Nothing where a
// size is out of range or a grid cannot hold the thread blocks. A grid of 0 thread blocks means an
// empty result, and must not be launched. `kernels` multiply; the sum of slices is the same for
// all.
inline std::optional<BlockSparseLinearWeightGradientPlan>
plan_block_sparse_linear_weight_gradient_cuda(
    const BlockSparseLinearWeightGradientShape& shape, WeightGradientType type, bool allow_tf32,
    bool aligned, const WeightGradientNames& kernels = weight_gradient_plan::kLinear) {
  using namespace weight_gradient_plan;
  constexpr int64_t kMaxFeatures = int64_t{1} << 30;  // the kernels count features in int
  constexpr int64_t kMaxKept = 2147483647;
  constexpr int64_t kMaxGridZ = 65535;
  if (shape.samples < 0 || shape.in_features < 0 || shape.in_features > kMaxFeatures ||
      shape.out_features < 0 || shape.out_features > kMaxFeatures || shape.rows < 1 ||
      shape.rows > 128 || shape.cols < 1 || shape.cols > 128 || shape.kept < 0 ||
      shape.kept > kMaxKept) {
    return std::nullopt;
  }
  const auto type_index = static_cast<int>(type);
  LaunchPlan product{nullptr, {0, 1, 1}, {kGradientThreads, 1, 1}, 0};
  int64_t row_tiles = 1;
  if (takes_tensor_cores(shape.rows, shape.cols, type, allow_tf32)) {
    int size = 0;
    while ((16 << size) < shape.rows) ++size;
    product.kernel = kernels.tensor_cores[type_index][aligned ? 0 : 1][size];
    product.shared_bytes = kSharedBytes[size];
  } else {
    const bool large = shape.rows > 32;
    product.kernel = kernels.plain[type_index][large ? 1 : 0];
    row_tiles = divide_up(shape.rows, large ? 64 : 16);
  }

  const int64_t columns = shape.kept * shape.cols;
  // Some more slices than this many thread blocks would need do no harm, since most may be empty.
  const int64_t useful = divide_up(columns, kGradientTileColumns) * row_tiles;
  int64_t slices = useful > 0 ? kGradientThreadBlocks / useful : 1;
  if (slices > shape.samples / kGradientMinSlice) slices = shape.samples / kGradientMinSlice;
  const int64_t least = divide_up(shape.samples, kGradientMaxSlice);
  if (slices < least) slices = least;
  if (slices < 1) slices = 1;
  if (slices > kMaxGridZ) return std::nullopt;
  const int64_t samples_per_slice =
      divide_up(divide_up(shape.samples, slices), kGradientSliceUnit) * kGradientSliceUnit;
  slices = samples_per_slice > 0 ? divide_up(shape.samples, samples_per_slice) : 1;

  LaunchPlan sum{kSum[type_index], {0, 1, 1}, {kGradientSumThreads, 1, 1}, 0};
  if (shape.kept > 0) {
    // Block row i begins at tile floor(crow[i] * cols / 128) + i: enough tiles for any pattern.
    const int64_t tiles =
        columns / kGradientTileColumns + divide_up(shape.out_features, shape.rows);
    const int64_t sum_blocks =
        slices > 1 ? divide_up(columns * shape.rows, kGradientSumThreads) : 0;
    if (tiles > kMaxGridX || sum_blocks > kMaxGridX) return std::nullopt;
    product.grid[0] = static_cast<uint32_t>(tiles);
    product.grid[1] = static_cast<uint32_t>(row_tiles);
    product.grid[2] = static_cast<uint32_t>(slices);
    sum.grid[0] = static_cast<uint32_t>(sum_blocks);
  }
  return BlockSparseLinearWeightGradientPlan{product, sum, slices, samples_per_slice};
}

}  // namespace fastprune
