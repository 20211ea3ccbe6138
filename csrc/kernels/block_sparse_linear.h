// block_sparse_linear: output[n, o] = activation(sum_i input[n, i] * weight[o, i] + bias[o])
//
// input  [samples, in_features], rows may be strided
// weight block-sparse, block_rows * rows >= out_features; padded rows and columns are ignored
// bias   [out_features] or null
// output [samples, out_features], must not alias an argument
//
// Sums accumulate in T, in the order of the kept blocks of a block row, so the bits depend
// neither on the number of threads nor on the other samples.
#pragma once

#include "types.h"

namespace fastprune {

template <class T>
struct BlockSparseLinearArgs {
  MatrixView<const T> input;
  BlockSparseView<T> weight;
  const T* bias;
  MatrixView<T> output;
  Activation activation;
};

// The work is a grid of (sample tile, block row). A block row costs its kept blocks plus one, for
// the bias and the store; the positions of the grid are counted in that cost, so that equal
// ranges of positions are equal work whatever the pattern.
// For the CPU: it reads crow_indices, and the sizes are those of CPU caches.
struct BlockSparseLinearWork {
  int64_t samples_per_tile;
  int64_t sample_tiles;
  int64_t cost_per_tile;   // kept blocks + block rows
  int64_t scratch_stride;  // 0: inputs are read in place
  int64_t total;           // positions of the grid
  int64_t scratch_size;    // elements that each thread needs to copy a tile of inputs into
};

// static: kernel files compiled for different instruction sets must not share one copy.
template <class T>
static BlockSparseLinearWork plan_block_sparse_linear(const BlockSparseLinearArgs<T>& args) {
  // A tile of inputs stays in the second-level cache (at least 512 KiB on the CPUs of the last
  // ten years) while all block rows pass over it. Multiples of 12 fill every register tile.
  constexpr int64_t kTileBytes = 256 * 1024;
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t sample_bytes = (args.input.cols > 0 ? args.input.cols : 1) * int64_t{sizeof(T)};
  int64_t samples = kTileBytes / sample_bytes / 12 * 12;
  if (samples < 24) samples = 24;
  if (samples > 192) samples = 192;
  if (samples > args.input.rows) samples = args.input.rows > 0 ? args.input.rows : 1;
  BlockSparseLinearWork work;
  work.samples_per_tile = samples;
  work.sample_tiles = (args.input.rows + samples - 1) / samples;
  const int64_t kept = args.weight.crow_indices[args.weight.block_rows];
  work.cost_per_tile = kept + args.weight.block_rows;
  // Rows a multiple of 2 KiB apart share one or two sets of the first-level cache, and the rows
  // of a register tile evict each other (1024 inputs: 45 % of the speed for 8x8 blocks). Such
  // tiles are copied to rows that lie an odd number of cache lines apart.
  const bool conflicts = samples > 4 && args.input.row_stride % (32 * kLine) == 0;
  work.scratch_stride = conflicts ? ((args.input.cols + kLine - 1) / kLine | 1) * kLine : 0;
  work.total = work.sample_tiles * work.cost_per_tile;
  work.scratch_size = samples * work.scratch_stride;
  return work;
}

}  // namespace fastprune
