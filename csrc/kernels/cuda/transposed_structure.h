// The structure of a block-sparse matrix by its block columns, made on the device: what
// ../transposed_structure.h makes on the CPU, without a word to the host.
#pragma once

#include <cuda_runtime_api.h>

#include "../types.h"

namespace fastprune {

// Entry j of column c, offsets[c] <= j < offsets[c + 1], is block blocks[j], of block row
// sources[j]; within a column they are in the order of the block rows.
struct TransposedStructureArgs {
  const int32_t* crow_indices;  // [block_rows + 1]
  const int32_t* col_indices;   // [kept], strictly increasing within a block row
  int64_t block_rows;
  int32_t* offsets;  // [block_cols + 1]
  int32_t* sources;  // [kept]
  int32_t* blocks;   // [kept]
};

// Queues the kernel on `stream` and returns at once. cudaErrorInvalidConfiguration: more block
// columns than a grid holds thread blocks.
cudaError_t launch_transposed_structure(const TransposedStructureArgs& args, int64_t block_cols,
                                        cudaStream_t stream);

}  // namespace fastprune
