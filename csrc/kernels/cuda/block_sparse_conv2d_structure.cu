// The lists of the input gradient of block_sparse_conv2d. One thread block for each list and tap,
// one thread for each block row, or block row and tap, at a time. In a block row's sorted columns,
// the blocks of a tap lie together: a binary search for where a tap begins, and one for the list's
// block within it, find how many blocks of this tap belong to earlier lists, and whether one
// belongs to this list. Over all block rows and taps of the group, these counts add up to where the
// thread block's entries begin. So nobody waits for another, and nothing is counted twice or by
// atomics.
#include "block_sparse_conv2d.h"
#include "block_sparse_conv2d_structure_plan.h"
#include "sorted_search.cuh"

namespace fastprune {

extern "C" __global__ void __launch_bounds__(kStructureThreads)
    block_sparse_conv2d_structure(const ConvolutionStructureArgs args) {
  __shared__ int32_t warp_counts[kStructureWarps];
  const int32_t taps = args.row_classes.taps * args.column_classes.taps;
  const auto list = static_cast<int32_t>(blockIdx.x) / taps;
  const auto tap = static_cast<int32_t>(blockIdx.x) % taps;
  const int32_t group = list / args.channel_blocks, block_of_tap = list % args.channel_blocks;
  const TapRank rank = tap_rank(args.row_classes, args.column_classes, tap);
  const int32_t place = rank.first + rank.within;
  const int32_t* crow = args.crow_indices + int64_t{group} * args.rows_per_group;
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32;

  int32_t before = 0;
  const auto pairs = static_cast<uint32_t>(args.rows_per_group * taps);
  for (uint32_t i = thread; i < pairs; i += kStructureThreads) {
    const auto row = static_cast<int32_t>(i / taps), other = static_cast<int32_t>(i % taps);
    const int32_t first_column = other * args.channel_blocks;
    const int32_t end = crow[row + 1];
    const int32_t begin = lower_bound(args.col_indices, crow[row], end, first_column);
    const int32_t block = lower_bound(args.col_indices, begin, end, first_column + block_of_tap);
    before += block - begin;
    // Of this list, the taps before.
    const TapRank other_rank = tap_rank(args.row_classes, args.column_classes, other);
    before += other_rank.first + other_rank.within < place && block < end &&
              args.col_indices[block] == first_column + block_of_tap;
  }
  before = __reduce_add_sync(~0u, before);
  if (lane == 0) warp_counts[warp] = before;
  __syncthreads();
  int32_t next = crow[0];
  for (int i = 0; i < kStructureWarps; ++i) next += warp_counts[i];
  if (thread == 0) {
    args.offsets[int64_t{list} * taps + place] = next;
    if (blockIdx.x == 0) {
      args.offsets[gridDim.x] = args.crow_indices[int64_t{args.groups} * args.rows_per_group];
    }
  }

  const int32_t column = tap * args.channel_blocks + block_of_tap;
  for (int32_t first = 0; first < args.rows_per_group; first += kStructureThreads) {
    const int32_t row = first + thread;
    bool kept = false;
    int32_t block = 0;
    if (row < args.rows_per_group) {
      const int32_t end = crow[row + 1];
      block = lower_bound(args.col_indices, crow[row], end, column);
      kept = block < end && args.col_indices[block] == column;
    }
    const uint32_t kept_lanes = __ballot_sync(~0u, kept);
    // The counts of the part before are still read.
    __syncthreads();
    if (lane == 0) warp_counts[warp] = __popc(kept_lanes);
    __syncthreads();
    int32_t position = next + __popc(kept_lanes & ((1u << lane) - 1));
    for (int i = 0; i < kStructureWarps; ++i) {
      position += i < warp ? warp_counts[i] : 0;
      next += warp_counts[i];
    }
    if (kept) {
      args.sources[position] = rank.within * args.rows_per_group + row;
      args.blocks[position] = block;
    }
  }
}

cudaError_t launch_convolution_structure(const ConvolutionStructureArgs& args,
                                         cudaStream_t stream) {
  const auto plan =
      plan_convolution_structure(int64_t{args.groups} * args.channel_blocks,
                                 int64_t{args.row_classes.taps} * args.column_classes.taps);
  if (!plan) return cudaErrorInvalidConfiguration;
  if (plan->grid[0] == 0) return cudaSuccess;
  block_sparse_conv2d_structure<<<dim3(plan->grid[0], plan->grid[1], plan->grid[2]),
                                  dim3(plan->block[0], plan->block[1], plan->block[2]),
                                  plan->shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace fastprune
