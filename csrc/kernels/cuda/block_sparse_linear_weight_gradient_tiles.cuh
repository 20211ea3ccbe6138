// How the kernels of the weight gradient find their work, and how they store it.
//
// grad_values holds the kept blocks of a block row one after the other, each [cols][rows]: a dense
// matrix of the block row's kept columns, numbered through, by `rows`. A thread block owns 128
// of these columns, whatever the block size; a column's place in the input comes from
// col_indices. Block row i owns the tiles from first_tile(i) = floor(crow[i] * cols / 128) + i on.
// These numbers grow with i, leave room for each block row's tiles, and need nothing but crow
// itself, so the host counts the thread blocks without reading an index; at most one tile for each
// block row is empty.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block_sparse_linear_weight_gradient.h"

namespace fastprune {

struct GradientTile {
  int first_output;     // of the block row
  int32_t first_block;  // of the block row
  int columns;          // kept in the block row
  int first_column;     // of the tile; the tile is empty where there is no such column
};

// Every warp searches by itself, 32 block rows at a time: two dependent reads for 1024 block rows.
template <class T>
__device__ __forceinline__ GradientTile
find_gradient_tile(const BlockSparseLinearWeightGradientArgs<T>& args) {
  const auto cols = static_cast<int>(args.cols);
  const int64_t tile = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto first_tile = [&](int block_row) {
    return int64_t{args.crow_indices[block_row]} * cols / kGradientTileColumns + block_row;
  };
  // first_tile(low) <= tile < first_tile(high)
  int low = 0, high = static_cast<int>(args.block_rows);
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int probe = min(low + (lane + 1) * step, high);
    const int passed = __popc(__ballot_sync(0xffffffff, first_tile(probe) <= tile));
    high = min(low + (passed + 1) * step, high);
    low += passed * step;
  }
  GradientTile found;
  found.first_output = low * static_cast<int>(args.rows);
  found.first_block = args.crow_indices[low];
  found.columns = (args.crow_indices[low + 1] - found.first_block) * cols;
  found.first_column = static_cast<int>(tile - first_tile(low)) * kGradientTileColumns;
  return found;
}

// The column of the input that a kept column of the block row stands for.
template <class T>
__device__ __forceinline__ int64_t input_column(const BlockSparseLinearWeightGradientArgs<T>& args,
                                                const GradientTile& tile, int column) {
  const auto cols = static_cast<uint32_t>(args.cols);
  const uint32_t block = static_cast<uint32_t>(column) / cols;
  return int64_t{args.col_indices[tile.first_block + block]} * cols + (column - block * cols);
}

// The samples of this thread block's slice: never none, but where there are no samples at all.
struct GradientSlice {
  int64_t begin;
  int samples;
};

template <class T>
__device__ __forceinline__ GradientSlice
gradient_slice(const BlockSparseLinearWeightGradientCudaArgs<T>& args) {
  const int64_t begin = blockIdx.z * args.samples_per_slice;
  return {begin, static_cast<int>(min(args.gradient.input.rows - begin, args.samples_per_slice))};
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16_rn(value);
}

// Two neighbours at once, which lie at a multiple of their size.
__device__ __forceinline__ void store_pair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = {first, second};
}
__device__ __forceinline__ void store_pair(__half* to, float first, float second) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(first, second);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float first, float second) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
}

}  // namespace fastprune
