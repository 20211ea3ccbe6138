// The product of ../block_product.h on the tensor cores, for blocks whose sides are multiples
// of 16.
//
// One thread block of four warps computes kSamples x kOutputs; each warp a quarter of the samples
// and all of the outputs, so that the warps have equal work whatever the pattern:
//
//                      weights: 16 x kOutputs      The outputs are strips of kStrip, each within
//                      one
//                     +----+----+----+----+        list of blocks. A strip's list may be shorter
//                     than | s0 |    | s2 |    |        that of its neighbours: the walk is over
//                     the union
//   inputs:           +----+----+----+----+        of their sources, a slot of 16 steps at a time.
//   kSamples x 16     +----+----+----+----+        Each slot stages one tile of inputs, and weights
//   +--------+        | s0 | s1 | s2 | s3 | warp 0 of those strips alone that have a block there;
//   |        |        +----+----+----+----+        only these are multiplied.
//   |        |        | s0 | s1 | s2 | s3 | warp 1
//   +--------+        +----+----+----+----+ ...
//
// Slots go through a ring of stages that asynchronous copies fill two stages ahead. Every output is
// one chain of products in the order of its own list, so its bits depend neither on the tile it
// falls in nor on its neighbours. Where the input ends within a block, inputs and weights are both
// zeros: the padding may hold NaN.
#pragma once

#include "activation.cuh"
#include "block_sparse_linear_plan.h"
#include "conversion.cuh"
#include "strip_walk.cuh"

namespace fastprune {

// The dynamic shared memory; one declaration for kernels of all types.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// A block product of one tile; kStepsTogether: the weight's steps lie side by side, not its
// outputs.
template <class T, bool kStepsTogether, int kSamples, int kOutputs, int kStrip>
class TileProduct {
 public:
  static constexpr int kStrips = kOutputs / kStrip;
  static constexpr int kWarpSamples = kSamples / kTileWarps;
  static constexpr int kSlots = kTileRowBytes / (kSlotSteps * sizeof(T));  // of a stage
  static constexpr int kInputElements = kSamples * kSlotSteps;
  static constexpr int kSlotElements = (kSamples + kOutputs) * kSlotSteps;
  static constexpr int kSharedBytes = kTileStages * kSlots * kSlotElements * sizeof(T);

  __device__ __forceinline__ explicit TileProduct(const BlockProductArgs<T>& args)
      : args_(args),
        stages_(reinterpret_cast<T*>(shared_memory())),
        thread_(static_cast<int>(threadIdx.x)),
        output_tiles_(static_cast<uint32_t>((args.output.cols + kOutputs - 1) / kOutputs)),
        // Neighbouring thread blocks share their inputs rather than their weights: all kept weights
        // together usually fit the second-level cache, all inputs do not.
        first_output_(int64_t{blockIdx.x % output_tiles_} * kOutputs),
        first_sample_(int64_t{blockIdx.x / output_tiles_} * kSamples),
        walk_(args.weight, first_output_, kStrip, thread_ % 32) {
    const int row = thread_ / StepTile<T>::kChunks, chunk = thread_ % StepTile<T>::kChunks;
    const int64_t sample = first_sample_ + row;
    input_ = args.input.data + sample * args.input.row_stride + chunk * kChunkElements<T>;
    // Rows that a thread copies are this far apart.
    input_step_ = kRowsAtOnce * args.input.row_stride;
    samples_ = static_cast<int>(min(args.input.rows - first_sample_, int64_t{kSamples})) - row;
    aligned_ = ((reinterpret_cast<uintptr_t>(args.input.data) |
                 static_cast<uintptr_t>(args.input.row_stride) * sizeof(T)) %
                16) == 0;
    if constexpr (kStepsTogether) {
#pragma unroll
      for (int i = 0; i < kWeightCopies; ++i) {
        const int output = row + i * kRowsAtOnce;
        const auto within = static_cast<int>((first_output_ + output) % args.weight.outputs);
        weight_offset_[i] =
            within * static_cast<int>(args.weight.steps) + chunk * kChunkElements<T>;
      }
    } else {
      const int output = thread_ % kOutputChunks * kChunkElements<T>;
      weight_offset_[0] = static_cast<int>((first_output_ + output) % args.weight.outputs);
    }
  }

  __device__ __forceinline__ void run() {
    static_assert(kTileStages == 3 && kSlots * kStrips <= 16, "the queue holds two stages");
    constexpr int kBits = kSlots * kStrips;
    uint32_t queue = 0;
    // One copy of the code, which is long, rather than two.
#pragma unroll 1
    for (int stage = 0; stage < 2; ++stage) queue |= copy_stage(stage) << stage * kBits;
    int stage = 0, empty = 2;
    while (const uint32_t masks = queue & ((1u << kBits) - 1)) {
      wait_for_copies<kTileStages - 2>();
      // All see the stage, and all have left the one that is filled next.
      __syncthreads();
      queue = queue >> kBits | copy_stage(empty) << kBits;
      multiply(stage, masks);
      empty = stage;
      stage = stage + 1 == kTileStages ? 0 : stage + 1;
    }
    // All stages are used and their copies waited for; the stores write over them.
    __syncthreads();
    store();
  }

 private:
  static constexpr int kRowsAtOnce = kTileThreads / StepTile<T>::kChunks;
  static constexpr int kOutputChunks = OutputTile<T, kOutputs>::kChunks;
  static constexpr int kWeightCopies = kOutputs / kRowsAtOnce;
  static_assert(kOutputs % kRowsAtOnce == 0 && kSamples % kRowsAtOnce == 0);
  static_assert(kTileThreads % kOutputChunks == 0);

  __device__ __forceinline__ T* slot_memory(int stage, int slot) const {
    return stages_ + (stage * kSlots + slot) * kSlotElements;
  }

  // Queues the copies of the next slots, and returns their masks.
  __device__ __forceinline__ uint32_t copy_stage(int stage) {
    uint32_t masks = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint32_t mask = walk_.mask();
      if (mask == 0) break;
      masks |= mask << slot * kStrips;
      const int64_t column = walk_.input_column();
      const auto steps = static_cast<int>(min(args_.input.cols - column, int64_t{kSlotSteps}));
      copy_inputs(slot_memory(stage, slot), column, steps);
      copy_weights(slot_memory(stage, slot) + kInputElements, mask, steps);
      walk_.advance();
    }
    commit_copies();
    return masks;
  }

  __device__ __forceinline__ void copy_inputs(T* tile, int64_t column, int steps) const {
    const int row = thread_ / StepTile<T>::kChunks, chunk = thread_ % StepTile<T>::kChunks;
    const int valid = valid_in_chunk<T>(steps - chunk * kChunkElements<T>);
    const T* source = input_ + column;
#pragma unroll
    for (int i = 0; i < kSamples / kRowsAtOnce; ++i) {
      // Samples that do not exist are 0 in the tile, and never stored.
      copy_chunk(tile + StepTile<T>::offset(row + i * kRowsAtOnce, chunk), source,
                 i * kRowsAtOnce < samples_ ? valid : 0, aligned_);
      source += input_step_;
    }
  }

  __device__ __forceinline__ void copy_weights(T* tile, uint32_t mask, int steps) const {
    const int64_t block_elements = args_.weight.outputs * args_.weight.steps;
    if constexpr (kStepsTogether) {
      const int row = thread_ / StepTile<T>::kChunks, chunk = thread_ % StepTile<T>::kChunks;
      const int valid = valid_in_chunk<T>(steps - chunk * kChunkElements<T>);
#pragma unroll
      for (int i = 0; i < kWeightCopies; ++i) {
        const int output = row + i * kRowsAtOnce, strip = output / kStrip;
        const T* block = args_.weight.values + walk_.block(strip) * block_elements;
        if (mask >> strip & 1) {
          copy_chunk(tile + StepTile<T>::offset(output, chunk),
                     block + weight_offset_[i] + walk_.step(), valid, true);
        }
      }
    } else {
      const int first_step = thread_ / kOutputChunks, chunk = thread_ % kOutputChunks;
      const int strip = chunk * kChunkElements<T> / kStrip;
      const auto outputs = static_cast<int>(args_.weight.outputs);
      const T* block =
          args_.weight.values + walk_.block(strip) * block_elements + weight_offset_[0];
      if (mask >> strip & 1) {
#pragma unroll
        for (int i = 0; i < kSlotSteps * kOutputChunks / kTileThreads; ++i) {
          const int step = first_step + i * (kTileThreads / kOutputChunks);
          copy_chunk(tile + OutputTile<T, kOutputs>::offset(step, chunk),
                     block + (walk_.step() + step) * outputs, step < steps ? kChunkElements<T> : 0,
                     true);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(int stage, uint32_t masks) {
    const int lane = thread_ % 32, first_row = thread_ / 32 * kWarpSamples;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint32_t mask = masks >> slot * kStrips & ((1u << kStrips) - 1);
      if (mask == 0) break;
      const T* inputs = slot_memory(stage, slot);
      const T* weights = inputs + kInputElements;
#pragma unroll
      for (int product = 0; product < kSlotProducts<T>; ++product) {
        uint32_t rows[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          load_rows<T>(rows[i], inputs, first_row + 16 * i, product, lane);
        }
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          if (kStrips > 1 && (mask >> strip & 1) == 0) continue;
#pragma unroll
          for (int output = strip * kStrip; output < (strip + 1) * kStrip; output += 16) {
            uint32_t outputs[4];
            if constexpr (kStepsTogether) {
              load_step_outputs<T>(outputs, weights, output, product, lane);
            } else {
              load_outputs<T, kOutputs>(outputs, weights, output, product, lane);
            }
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              multiply_add_pair<T>(sums_[i][output / 8], sums_[i][output / 8 + 1], rows[i],
                                   outputs);
            }
          }
        }
      }
    }
  }

  // The sums leave through shared memory, 64 outputs of a warp's samples at a time, so that each
  // sample is stored in whole lines, and the activation's code stands there once.
  __device__ __forceinline__ void store() {
    constexpr int kWidth = 64;
    constexpr bool kApart = kOddsApart<T, kStepsTogether>;
    constexpr int kRow = kWidth + (kApart ? 16 : 8);
    static_assert(kTileWarps * kWarpSamples * kRow * sizeof(float) <= kSharedBytes);
    const int lane = thread_ % 32, warp = thread_ / 32;
    float* memory = reinterpret_cast<float*>(shared_memory()) + warp * kWarpSamples * kRow;
    const int samples = static_cast<int>(
        min(args_.input.rows - first_sample_ - warp * kWarpSamples, int64_t{kWarpSamples}));
#pragma unroll
    for (int half = 0; half < kOutputs / kWidth; ++half) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth / 8; j += 2) {
          const auto& sums = sums_[i];
          const int column = half * (kWidth / 8) + j;
          write_sums<kApart>(memory + 16 * i * kRow + 8 * j, kRow, sums[column], sums[column + 1],
                             lane);
        }
      }
      __syncwarp();
      store_outputs(memory + lane / 16 * kRow + lane % 16 * 4,
                    first_sample_ + warp * kWarpSamples + lane / 16, samples - lane / 16, 2, kRow,
                    first_output_ + half * kWidth + lane % 16 * 4);
      __syncwarp();
    }
  }

  // Four outputs of every `row_step`-th sample.
  __device__ __forceinline__ void store_outputs(const float* sums, int64_t first_sample,
                                                int samples, int row_step, int sums_row,
                                                int64_t output) const {
    const auto outputs = static_cast<int>(min(args_.output.cols - output, int64_t{4}));
    if (outputs <= 0) return;
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i] = args_.bias && i < outputs ? to_float(args_.bias[output + i]) : 0.0f;
    }
    const bool together = outputs == 4 && args_.output.row_stride % 4 == 0;
    T* target = args_.output.data + first_sample * args_.output.row_stride + output;
#pragma unroll 1
    for (int row = 0; row < samples; row += row_step) {
      const float4 four = *reinterpret_cast<const float4*>(sums + row * sums_row);
      const float values[4] = {four.x, four.y, four.z, four.w};
      alignas(16) T results[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        results[i] = from_float<T>(activate(values[i] + bias[i], args_.activation));
      }
      if (together) {
        using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
        *reinterpret_cast<Four*>(target) = *reinterpret_cast<const Four*>(results);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < outputs) target[i] = results[i];
        }
      }
      target += row_step * args_.output.row_stride;
    }
  }

  static constexpr int kRowTiles = kWarpSamples / 16;

  const BlockProductArgs<T>& args_;
  T* stages_;
  int thread_;
  uint32_t output_tiles_;
  int64_t first_output_, first_sample_;
  StripWalk<kStrips> walk_;
  const T* input_;
  int64_t input_step_;
  int samples_;  // from this thread's first row on
  bool aligned_;
  int weight_offset_[kStepsTogether ? kWeightCopies : 1];
  float sums_[kRowTiles][kOutputs / 8][4] = {};
};

}  // namespace fastprune
