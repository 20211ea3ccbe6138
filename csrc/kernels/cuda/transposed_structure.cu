// One thread block for each block column c, one thread for each block row at a time. A binary
// search for c in the sorted columns of a block row finds both its block and how many of its blocks
// lie before c; over all block rows, the latter add up to where column c begins. So no column waits
// for another, and nothing is counted twice or by atomics.
#include "transposed_structure.h"

#include "sorted_search.cuh"
#include "transposed_structure_plan.h"

namespace fastprune {
extern "C" __global__ void __launch_bounds__(kStructureThreads)
    transposed_structure(const TransposedStructureArgs args) {
  __shared__ int32_t warp_counts[kStructureWarps];
  const auto column = static_cast<int32_t>(blockIdx.x);
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32;

  int32_t before = 0;
  for (int64_t row = thread; row < args.block_rows; row += kStructureThreads) {
    const int32_t begin = args.crow_indices[row], end = args.crow_indices[row + 1];
    before += lower_bound(args.col_indices, begin, end, column) - begin;
  }
  before = __reduce_add_sync(~0u, before);
  if (lane == 0) warp_counts[warp] = before;
  __syncthreads();
  int32_t next = 0;
  for (int i = 0; i < kStructureWarps; ++i) next += warp_counts[i];
  if (thread == 0) args.offsets[column] = next;
  if (blockIdx.x + 1 == gridDim.x) return;

  for (int64_t first = 0; first < args.block_rows; first += kStructureThreads) {
    const int64_t row = first + thread;
    bool kept = false;
    int32_t block = 0;
    if (row < args.block_rows) {
      const int32_t end = args.crow_indices[row + 1];
      block = lower_bound(args.col_indices, args.crow_indices[row], end, column);
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
      args.sources[position] = static_cast<int32_t>(row);
      args.blocks[position] = block;
    }
  }
}

cudaError_t launch_transposed_structure(const TransposedStructureArgs& args, int64_t block_cols,
                                        cudaStream_t stream) {
  const auto plan = plan_transposed_structure(block_cols);
  if (!plan) return cudaErrorInvalidConfiguration;
  transposed_structure<<<dim3(plan->grid[0], plan->grid[1], plan->grid[2]),
                         dim3(plan->block[0], plan->block[1], plan->block[2]), plan->shared_bytes,
                         stream>>>(args);
  return cudaGetLastError();
}

}  // namespace fastprune
