// block_sparse_linear forward in float32 on CUDA; the contract is in ../block_sparse_linear.h.
//
// One thread block computes 64 samples x 16 outputs of one block row. It walks that row's kept
// blocks in order, 32 columns at a time; each step stages a tile of inputs and a tile of weights
// in shared memory:
//
//                     weights: 32 x 16
//                    +-----------------+   128 threads, 8 along the rows and 16 along the
//                    | [column][row]   |   samples: thread (x, y) holds, across all steps, the
//   inputs: 64 x 32  +-----------------+   sums of rows 2x and 2x + 1 and of samples y, y + 16,
//   +-------------+  +-----------------+   y + 32 and y + 48. For each column it reads 4 inputs
//   | [sample]    |  | outputs         |   and 2 weights for 8 multiply-adds.
//   |    [column] |  |        64 x 16  |
//   +-------------+  +-----------------+
//
// 16 rows are those of the default block, which wastes nothing here; a block of any other size
// is covered by as many tiles as it takes. Every output is one chain of fused multiply-adds in
// the order of the columns, so its bits depend neither on the tile it falls in nor on the other
// samples. Padding may hold anything: it is never read.
#include "block_sparse_linear.h"

#include "block_sparse_linear_plan.h"

namespace fastprune {
namespace {

constexpr int kTileColumns = 32;  // a warp loads one sample's columns as one 128-byte line
constexpr int kThreadRows = 2;
constexpr int kThreadSamples = 4;
constexpr int kThreadsAlongRows = kLinearTileRows / kThreadRows;
constexpr int kThreadsAlongSamples = kLinearTileSamples / kThreadSamples;
constexpr int kWarps = kLinearThreads / kTileColumns;
static_assert(kThreadsAlongRows * kThreadsAlongSamples == kLinearThreads);

// A size within a tile: `remaining`, cut to the tile.
__device__ int at_most(int64_t remaining, int64_t tile) {
  return static_cast<int>(min(remaining, tile));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kLinearThreads)
    block_sparse_linear_f32(const BlockSparseLinearArgs<float> args) {
  // The odd row length puts the four samples that a warp reads together into different banks.
  __shared__ float inputs[kLinearTileSamples][kTileColumns + 1];
  __shared__ float2 weights[kTileColumns][kThreadsAlongRows];

  const auto rows = static_cast<int>(args.weight.rows);
  const auto cols = static_cast<int>(args.weight.cols);
  // Neighbouring thread blocks share their inputs rather than their weights: all kept weights
  // together usually fit the second-level cache, all inputs do not.
  const uint32_t row_tiles = (static_cast<uint32_t>(rows) + kLinearTileRows - 1) / kLinearTileRows;
  const uint32_t output_tiles = static_cast<uint32_t>(args.weight.block_rows) * row_tiles;
  const uint32_t output_tile = blockIdx.x % output_tiles;
  const uint32_t block_row = output_tile / row_tiles;
  const int first_row = static_cast<int>(output_tile % row_tiles) * kLinearTileRows;
  const int64_t first_output = int64_t{block_row} * rows + first_row;
  const int64_t first_sample = int64_t{blockIdx.x / output_tiles} * kLinearTileSamples;
  const int tile_samples = at_most(args.input.rows - first_sample, kLinearTileSamples);
  // The last tile of a block row may reach past the block, and the last block past the outputs.
  const int tile_rows =
      at_most(args.output.cols - first_output, at_most(rows - first_row, kLinearTileRows));

  const auto thread = static_cast<int>(threadIdx.x);
  const int x = thread % kThreadsAlongRows, y = thread / kThreadsAlongRows;
  float sums[kThreadSamples][kThreadRows] = {};

  const int32_t last_block = args.weight.crow_indices[block_row + 1];
  for (int32_t k = args.weight.crow_indices[block_row]; k < last_block; ++k) {
    const int64_t first_column = int64_t{args.weight.col_indices[k]} * cols;
    const int columns = at_most(args.input.cols - first_column, cols);
    const float* block_inputs =
        args.input.data + first_sample * args.input.row_stride + first_column;
    const float* block_weights =
        args.weight.packed_values + k * args.weight.cols * args.weight.rows + first_row;

    for (int begin = 0; begin < columns; begin += kTileColumns) {
      const int tile_columns = at_most(columns - begin, kTileColumns);
      const int warp = thread / kTileColumns, column = thread % kTileColumns;
      if (column < tile_columns) {
        const float* source = block_inputs + begin + column;
#pragma unroll 4
        for (int i = 0; i < kLinearTileSamples / kWarps; ++i) {
          const int s = warp + i * kWarps;
          // Samples and rows that do not exist are 0 in the tile, and never stored.
          inputs[s][column] = s < tile_samples ? source[s * args.input.row_stride] : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kTileColumns / kThreadsAlongSamples; ++i) {
        const int c = y + i * kThreadsAlongSamples;
        if (c < tile_columns) {
          const float* source = block_weights + (begin + c) * args.weight.rows + kThreadRows * x;
          weights[c][x] = {kThreadRows * x < tile_rows ? source[0] : 0.0f,
                           kThreadRows * x + 1 < tile_rows ? source[1] : 0.0f};
        }
      }
      __syncthreads();
#pragma unroll 4
      for (int c = 0; c < tile_columns; ++c) {
        const float2 weight = weights[c][x];
#pragma unroll
        for (int i = 0; i < kThreadSamples; ++i) {
          const float input = inputs[y + i * kThreadsAlongSamples][c];
          sums[i][0] = fmaf(input, weight.x, sums[i][0]);
          sums[i][1] = fmaf(input, weight.y, sums[i][1]);
        }
      }
      // The next step overwrites the tiles.
      __syncthreads();
    }
  }

  // Compared, not fmaxf, which would turn NaN into a number.
  const float lowest = args.activation == Activation::kRelu ? 0.0f : -INFINITY;
#pragma unroll
  for (int j = 0; j < kThreadRows; ++j) {
    const int row = kThreadRows * x + j;
    if (row >= tile_rows) break;
    const float bias = args.bias ? args.bias[first_output + row] : 0.0f;
#pragma unroll
    for (int i = 0; i < kThreadSamples; ++i) {
      const int s = y + i * kThreadsAlongSamples;
      if (s < tile_samples) {
        const float value = sums[i][j] + bias;
        args.output.data[(first_sample + s) * args.output.row_stride + first_output + row] =
            value < lowest ? lowest : value;
      }
    }
  }
}

cudaError_t launch_block_sparse_linear(const BlockSparseLinearArgs<float>& args,
                                       cudaStream_t stream) {
  const auto plan = plan_block_sparse_linear_cuda(
      {args.input.rows, args.input.cols, args.output.cols, args.weight.rows, args.weight.cols});
  if (!plan) return cudaErrorInvalidConfiguration;
  if (plan->grid[0] == 0) return cudaSuccess;
  block_sparse_linear_f32<<<dim3(plan->grid[0], plan->grid[1], plan->grid[2]),
                            dim3(plan->block[0], plan->block[1], plan->block[2]),
                            plan->shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace fastprune
