// The product of ../block_product.h for any block, in float: of float32, and of 16-bit types where
// a block's sides are no multiples of 16.
//
// One thread block computes 64 samples x 16 outputs of one list. It walks the list's blocks in
// order, 32 steps at a time; for each it stages a tile of inputs and a tile of weights in shared
// memory:
//
//                     weights: 32 x 16
//                    +-----------------+   128 threads, 8 along the rows and 16 along the
//                    | [step][output]  |   samples: thread (x, y) holds, across all steps, the
//   inputs: 64 x 32  +-----------------+   sums of outputs 2x and 2x + 1 and of samples y, y + 16,
//   +-------------+  +-----------------+   y + 32 and y + 48. For each step it reads 4 inputs
//   | [sample]    |  | outputs         |   and 2 weights for 8 multiply-adds.
//   |      [step] |  |        64 x 16  |
//   +-------------+  +-----------------+
//
// 16 outputs are those of the default block, which wastes nothing here; a block of any other size
// is covered by as many tiles as it takes. Every output is one chain of fused multiply-adds in
// the order of the steps, so its bits depend neither on the tile it falls in nor on the other
// samples. Padding may hold anything: it is never read.
#pragma once

#include "activation.cuh"
#include "block_product_operands.cuh"
#include "block_sparse_linear_plan.h"

namespace fastprune {

constexpr int kTileSteps = 32;  // a warp loads one sample's steps as one line
constexpr int kThreadOutputs = 2;
constexpr int kThreadSamples = 4;
constexpr int kThreadsAlongOutputs = kLinearTileOutputs / kThreadOutputs;
constexpr int kThreadsAlongSamples = kLinearTileSamples / kThreadSamples;
constexpr int kWarps = kLinearThreads / kTileSteps;
static_assert(kThreadsAlongOutputs * kThreadsAlongSamples == kLinearThreads);

// A size within a tile: `remaining`, cut to the tile.
__device__ __forceinline__ int at_most(int64_t remaining, int64_t tile) {
  return static_cast<int>(min(remaining, tile));
}

// Args says what the samples are (block_product_operands.cuh).
template <template <class> class Args, class T>
__device__ __forceinline__ void any_block_product(const Args<T>& args) {
  // The odd row length puts the four samples that a warp reads together into different banks; the
  // even one of the weights, steps that are written together, two by two.
  __shared__ float inputs[kLinearTileSamples][kTileSteps + 1];
  __shared__ float2 weights[kTileSteps][kThreadsAlongOutputs + 1];

  const auto& weight = args.weight;
  const auto outputs = static_cast<int>(weight.outputs);
  const auto steps = static_cast<int>(weight.steps);
  // Neighbouring thread blocks share their inputs rather than their weights: all kept weights
  // together usually fit the second-level cache, all inputs do not.
  const uint32_t list_tiles =
      (static_cast<uint32_t>(outputs) + kLinearTileOutputs - 1) / kLinearTileOutputs;
  const uint32_t output_tiles = static_cast<uint32_t>(weight.lists) * list_tiles;
  const uint32_t output_tile = blockIdx.x % output_tiles;
  const uint32_t list = output_tile / list_tiles;
  const int first_in_list = static_cast<int>(output_tile % list_tiles) * kLinearTileOutputs;
  const int64_t first_output = int64_t{list} * outputs + first_in_list;
  const int64_t first_sample = int64_t{blockIdx.x / output_tiles} * kLinearTileSamples;
  const int tile_samples = at_most(args.input.rows - first_sample, kLinearTileSamples);
  // The last tile of a list may reach past the block, and the last block past the outputs.
  const OutputColumns columns =
      output_columns(args, first_output, at_most(outputs - first_in_list, kLinearTileOutputs));
  const int tile_outputs = columns.count;
  const InputTile<Args, T> input(args, first_sample);

  const auto thread = static_cast<int>(threadIdx.x);
  const int x = thread % kThreadsAlongOutputs, y = thread / kThreadsAlongOutputs;
  float sums[kThreadSamples][kThreadOutputs] = {};

  const ListEntries entries = entries_of(args, list);
  for (int32_t entry = entries.begin; entry < entries.end; ++entry) {
    const auto place = input.place_of(weight.sources[entry] + entries.first_source, steps);
    const int64_t block = weight.blocks ? weight.blocks[entry] : entry;
    const int block_steps = at_most(args.input.cols - place.column, steps);
    const T* block_weights = weight.values + block * weight.steps * weight.outputs +
                             first_in_list * weight.output_stride;

    for (int begin = 0; begin < block_steps; begin += kTileSteps) {
      const int tile_steps = at_most(block_steps - begin, kTileSteps);
      const int warp = thread / kTileSteps, step = thread % kTileSteps;
      if (step < tile_steps) {
        const auto column = input.column(place, begin + step);
#pragma unroll 4
        for (int i = 0; i < kLinearTileSamples / kWarps; ++i) {
          const int s = warp + i * kWarps;
          // Samples and outputs that do not exist are 0 in the tile, and never stored.
          inputs[s][step] = s < tile_samples ? column.value(s) : 0.0f;
        }
      }
      // Along the dimension whose elements lie side by side.
      const bool steps_together = weight.step_stride == 1;
#pragma unroll
      for (int i = 0; i < kTileSteps * kLinearTileOutputs / kLinearThreads; ++i) {
        const int element = thread + i * kLinearThreads;
        const int s = steps_together ? element % kTileSteps : element / kLinearTileOutputs;
        const int o = steps_together ? element / kTileSteps : element % kLinearTileOutputs;
        if (s < tile_steps) {
          const T* source =
              block_weights + (begin + s) * weight.step_stride + o * weight.output_stride;
          reinterpret_cast<float*>(weights[s])[o] = o < tile_outputs ? to_float(*source) : 0.0f;
        }
      }
      __syncthreads();
#pragma unroll 4
      for (int s = 0; s < tile_steps; ++s) {
        const float2 pair = weights[s][x];
#pragma unroll
        for (int i = 0; i < kThreadSamples; ++i) {
          const float input = inputs[y + i * kThreadsAlongSamples][s];
          sums[i][0] = fmaf(input, pair.x, sums[i][0]);
          sums[i][1] = fmaf(input, pair.y, sums[i][1]);
        }
      }
      // The next step overwrites the tiles.
      __syncthreads();
    }
  }

#pragma unroll
  for (int j = 0; j < kThreadOutputs; ++j) {
    const int o = kThreadOutputs * x + j;
    if (o >= tile_outputs) break;
    const float bias = args.bias ? to_float(args.bias[columns.first + o]) : 0.0f;
    OutputRows<Args, T> rows(args, first_sample + y, columns.first + o);
#pragma unroll
    for (int i = 0; i < kThreadSamples; ++i) {
      const int s = y + i * kThreadsAlongSamples;
      if (s < tile_samples) {
        *rows.target() = from_float<T>(activate(sums[i][j] + bias, args.activation));
      }
      rows.advance(kThreadsAlongSamples);
    }
  }
}

}  // namespace fastprune
