// The product of ../block_product.h on the tensor cores, for blocks whose sides are multiples
// of 16.
//
// One thread block computes kSamples x kOutputs; each warp an equal part of the samples and all of
// the outputs, so that the warps have equal work whatever the pattern:
//
//                      weights: 16 x kOutputs    The outputs are strips of kStrip, each within one
//                     +----+----+----+----+      list of blocks. A strip's list may be shorter than
//                     | s0 |    | s2 |    |      that of its neighbours: the walk is over the union
//   inputs:           +----+----+----+----+      of their sources, a slot of 16 steps at a time.
//   kSamples x 16     +----+----+----+----+      Each slot stages one tile of inputs, and weights
//   +--------+        | s0 | s1 | s2 | s3 | warp 0   of those strips alone that have a block
//   |        |        +----+----+----+----+          there; only these are multiplied.
//   |        |        | s0 | s1 | s2 | s3 | warp 1
//   +--------+        +----+----+----+----+ ...
//
// Slots go through a ring of stages that asynchronous copies fill all but one stage ahead. Every
// output is one chain of products in the order of its own list, so its bits depend neither on the
// tile it falls in nor on its neighbours. Where the input ends within a block, inputs and weights
// are both zeros: the padding may hold NaN.
#pragma once

#include "activation.cuh"
#include "block_product_operands.cuh"
#include "block_sparse_linear_plan.h"
#include "strip_walk.cuh"

namespace fastprune {

// The dynamic shared memory; one declaration for kernels of all types.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// A block product of one tile; Args says what the samples are (block_product_operands.cuh).
// kStepsTogether: the weight's steps lie side by side, not its outputs, as in the input gradient,
// whose entries name their blocks. kAligned: the rows of the input begin, and all end, at multiples
// of 16 bytes.
template <template <class> class Args, class T, class Tile, bool kStepsTogether, bool kAligned>
class TileProduct {
 public:
  __device__ __forceinline__ explicit TileProduct(const Args<T>& args)
      : args_(args),
        stages_(shared_address(shared_memory())),
        thread_(static_cast<int>(threadIdx.x)),
        walk_(args, first_output(), Tile::kStrip, thread_ % 32),
        block_elements_(static_cast<uint32_t>(args.weight.outputs * args.weight.steps)),
        inputs_(args, first_sample(), thread_ / Steps::kChunks, kRowsAtOnce,
                thread_ % Steps::kChunks) {
    const int row = thread_ / Steps::kChunks, chunk = thread_ % Steps::kChunks;
    step_offset_ = Steps::offset(row, chunk);
    if constexpr (kStepsTogether) {
#pragma unroll
      for (int i = 0; i < kWeightCopies; ++i) {
        weight_offset_[i] =
            within_block(row + i * kRowsAtOnce) * args.weight.steps + chunk * kChunkElements<T>;
      }
    } else {
      const int step = thread_ / Outputs::kChunks, first = thread_ % Outputs::kChunks;
      output_offset_ = Outputs::offset(step, first);
#pragma unroll
      for (int i = 0; i < kWeightCopies; ++i) {
        weight_offset_[i] = (step + i * kStepsAtOnce) * args.weight.outputs +
                            within_block(first * kChunkElements<T>);
      }
    }
    const int lane = thread_ % 32;
#pragma unroll
    for (int i = 0; i < kSlotProducts<T>; ++i) {
      rows_offset_[i] = rows_offset<T>(i, lane) + thread_ / 32 * kWarpSamples * Steps::kRowBytes;
    }
#pragma unroll
    for (int i = 0; i < kWeightAddresses; ++i) {
      operand_offset_[i] =
          kInputBytes + (kStepsTogether ? step_outputs_offset<T>(i, lane)
                                        : outputs_offset<T, kOutputs>(16 * i, lane));
      // Else the compiler computes it anew before each use.
      asm("" : "+r"(operand_offset_[i]));
    }
  }

  __device__ __forceinline__ void run() {
    static_assert((Tile::kStages - 1) * kStageBits <= 32, "the queue holds all stages but one");
    uint32_t queue = 0, empty = stages_;
    // One copy of the code, which is long, rather than one for each stage.
#pragma unroll 1
    for (int bit = 0; bit < (Tile::kStages - 1) * kStageBits; bit += kStageBits) {
      queue |= copy_stage(empty) << bit;
      empty += kStageBytes;
    }
    uint32_t full = stages_;
    while (const uint32_t masks = queue & ((1u << kStageBits) - 1)) {
      wait_for_copies<Tile::kStages - 2>();
      // All see the stage, and all have left the one that is filled next.
      __syncthreads();
      queue = queue >> kStageBits | copy_stage(empty) << (Tile::kStages - 2) * kStageBits;
      multiply(full, masks);
      empty = full;
      full = full == stages_ + (Tile::kStages - 1) * kStageBytes ? stages_ : full + kStageBytes;
    }
    // All stages are used and their copies waited for; the stores write over them.
    __syncthreads();
    store();
  }

 private:
  static constexpr int kSamples = Tile::kSamples, kOutputs = Tile::kOutputs;
  using Steps = StepTile<T>;
  using Outputs = OutputTile<T, kOutputs>;

  static constexpr int kStrips = kOutputs / Tile::kStrip;
  static constexpr int kWarpSamples = kSamples / Tile::kWarps;
  static constexpr int kRowTiles = kWarpSamples / 16;
  static constexpr int kSlots = kTileRowBytes / Steps::kRowBytes;  // of a stage
  static constexpr int kStageBits = kSlots * kStrips;
  static constexpr int kInputBytes = kSamples * Steps::kRowBytes;
  static constexpr int kSlotBytes = (kSamples + kOutputs) * Steps::kRowBytes;
  static constexpr int kStageBytes = kSlots * kSlotBytes;
  static_assert(Tile::kStages * kStageBytes == Tile::kSharedBytes);

  // Rows, or steps of an OutputTile, that all threads copy at once.
  static constexpr int kRowsAtOnce = Tile::kThreads / Steps::kChunks;
  static constexpr int kStepsAtOnce = Tile::kThreads / Outputs::kChunks;
  static constexpr int kInputCopies = kSamples / kRowsAtOnce;
  // Of the rows, or steps, of a slot's weights, which may be fewer than all threads copy at once.
  static constexpr int kWeightRows = kStepsTogether ? kOutputs : kSlotSteps;
  static constexpr int kWeightRowsAtOnce = kStepsTogether ? kRowsAtOnce : kStepsAtOnce;
  static constexpr int kThreadsOfWeightRow = Tile::kThreads / kWeightRowsAtOnce;
  static constexpr int kWeightCopies = (kWeightRows + kWeightRowsAtOnce - 1) / kWeightRowsAtOnce;
  static constexpr int kWeightAddresses =
      kStepsTogether ? kSlotProducts<T> : Outputs::kSwizzled / 16;
  static_assert(kRowsAtOnce % 8 == 0 && kStepsAtOnce % 8 == 0, "copies are swizzled alike");
  static_assert(kInputCopies * kRowsAtOnce == kSamples);
  using Inputs = InputRows<Args, T, kInputCopies, kAligned>;
  using Place = typename Inputs::Place;

  __device__ __forceinline__ uint32_t output_tiles() const {
    return (static_cast<uint32_t>(args_.output.cols) + kOutputs - 1) / kOutputs;
  }

  // Neighbouring thread blocks share their inputs rather than their weights: all kept weights
  // together usually fit the second-level cache, all inputs do not. Worked out anew for the store,
  // since the loop has no registers left.
  __device__ __forceinline__ uint32_t first_output() const {
    return blockIdx.x % output_tiles() * kOutputs;
  }
  __device__ __forceinline__ int64_t first_sample() const {
    return int64_t{blockIdx.x / output_tiles()} * kSamples;
  }

  __device__ __forceinline__ uint32_t within_block(int output) const {
    return (first_output() + output) % static_cast<uint32_t>(args_.weight.outputs);
  }

  // Queues the copies of the next slots, and returns their masks.
  __device__ __forceinline__ uint32_t copy_stage(uint32_t stage) {
    uint32_t masks = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint32_t mask = walk_.mask();
      masks |= mask << slot * kStrips;
      const Place place = inputs_.place_of(walk_);
#pragma unroll
      for (int i = 0; i < kInputCopies; ++i) {
        inputs_.copy(i,
                     stage + slot * kSlotBytes + step_offset_ + i * kRowsAtOnce * Steps::kRowBytes,
                     mask != 0, place);
      }
      copy_weights(stage + slot * kSlotBytes + kInputBytes, mask, place);
      walk_.advance();
    }
    commit_copies();
    return masks;
  }

  __device__ __forceinline__ void copy_weights(uint32_t tile, uint32_t mask,
                                               const Place& place) const {
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      uint32_t target, offset = weight_offset_[i];
      int strip, columns;
      if constexpr (kStepsTogether) {
        strip = (thread_ / Steps::kChunks + i * kRowsAtOnce) / Tile::kStrip;
        target = tile + step_offset_ + i * kRowsAtOnce * Steps::kRowBytes;
        columns = inputs_.columns_from(place);
        offset += walk_.step();
      } else {
        strip = thread_ % Outputs::kChunks * kChunkElements<T> / Tile::kStrip;
        target = tile + output_offset_ + i * kStepsAtOnce * Outputs::kStepBytes;
        columns = static_cast<int>(args_.input.cols) - static_cast<int>(place.column) -
                  thread_ / Outputs::kChunks - i * kStepsAtOnce;
        offset += walk_.step() * static_cast<uint32_t>(args_.weight.outputs);
      }
      offset += walk_.block(strip) * block_elements_;
      int valid = columns > 0 ? 16 : 0;
      if constexpr (kStepsTogether && !kAligned) valid = valid_in_chunk<T>(columns) * sizeof(T);
      bool wanted = mask >> strip & 1;
      if constexpr (kWeightRowsAtOnce > kWeightRows) {
        wanted &= thread_ < kWeightRows * kThreadsOfWeightRow;
      }
      copy_async_where(wanted, target, args_.weight.values + offset, valid);
    }
  }

  __device__ __forceinline__ void multiply(uint32_t stage, uint32_t masks) {
    // Few addresses serve all loads: the others lie at constant distances from them.
    uint32_t inputs[kSlotProducts<T>], weights[kWeightAddresses];
#pragma unroll
    for (int i = 0; i < kSlotProducts<T>; ++i) inputs[i] = stage + rows_offset_[i];
#pragma unroll
    for (int i = 0; i < kWeightAddresses; ++i) weights[i] = stage + operand_offset_[i];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint32_t mask = masks >> slot * kStrips & ((1u << kStrips) - 1);
      // The first of a stage has strips.
      if (slot > 0 && mask == 0) break;
#pragma unroll
      for (int product = 0; product < kSlotProducts<T>; ++product) {
        uint32_t rows[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          load_operand<T>(rows[i], inputs[product] + slot * kSlotBytes + 16 * i * Steps::kRowBytes);
        }
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          if ((mask >> strip & 1) == 0) continue;
#pragma unroll
          for (int output = strip * Tile::kStrip; output < (strip + 1) * Tile::kStrip;
               output += 16) {
            uint32_t outputs[4];
            if constexpr (kStepsTogether) {
              load_operand<T>(outputs,
                              weights[product] + slot * kSlotBytes + output * Steps::kRowBytes);
            } else {
              load_outputs<T, kOutputs>(outputs,
                                        weights[output % Outputs::kSwizzled / 16] +
                                            slot * kSlotBytes + output / Outputs::kSwizzled * 128,
                                        product);
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

  // The sums leave through shared memory, a line of each of a warp's samples at a time, so that
  // whole lines are stored, and the activation's code stands there once.
  __device__ __forceinline__ void store() {
    constexpr int kWidth = 128 / sizeof(T);
    constexpr int kLanes = kWidth / 4;  // of a line
    constexpr bool kApart = kOddsApart<T, kStepsTogether>;
    constexpr int kRow = kWidth + (kApart ? 16 : 8);
    static_assert(kSamples * kRow * sizeof(float) <= Tile::kSharedBytes);
    const int lane = thread_ % 32, warp = thread_ / 32;
    float* memory = reinterpret_cast<float*>(shared_memory()) + warp * kWarpSamples * kRow;
    const int64_t first_sample = this->first_sample() + warp * kWarpSamples;
    const int samples =
        static_cast<int>(min(args_.input.rows - first_sample, int64_t{kWarpSamples}));
    const int64_t first_output = this->first_output();
#pragma unroll
    for (int part = 0; part < kOutputs / kWidth; ++part) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth / 8; j += 2) {
          const auto& sums = sums_[i];
          const int column = part * (kWidth / 8) + j;
          write_sums<kApart>(memory + 16 * i * kRow + 8 * j, kRow, sums[column], sums[column + 1],
                             lane);
        }
      }
      __syncwarp();
      store_outputs(memory + lane / kLanes * kRow + lane % kLanes * 4, first_sample + lane / kLanes,
                    samples - lane / kLanes, 32 / kLanes, kRow,
                    first_output + part * kWidth + lane % kLanes * 4);
      __syncwarp();
    }
  }

  // Four outputs of every `row_step`-th sample.
  __device__ __forceinline__ void store_outputs(const float* sums, int64_t first_sample,
                                                int samples, int row_step, int sums_row,
                                                int64_t output) const {
    const OutputColumns columns = output_columns(args_, output, 4);
    if (columns.count <= 0) return;
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i] = args_.bias && i < columns.count ? to_float(args_.bias[columns.first + i]) : 0.0f;
    }
    const bool together = columns.count == 4 && columns.aligned;
    OutputRows<Args, T> rows(args_, first_sample, columns.first);
#pragma unroll 1
    for (int row = 0; row < samples; row += row_step) {
      const float4 four = *reinterpret_cast<const float4*>(sums + row * sums_row);
      const float values[4] = {four.x, four.y, four.z, four.w};
      alignas(16) T results[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        results[i] = from_float<T>(activate(values[i] + bias[i], args_.activation));
      }
      T* target = rows.target();
      if (together) {
        using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
        *reinterpret_cast<Four*>(target) = *reinterpret_cast<const Four*>(results);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < columns.count) target[i] = results[i];
        }
      }
      rows.advance(row_step);
    }
  }

  const Args<T>& args_;
  uint32_t stages_;
  int thread_;
  StripWalk<kStrips, kStepsTogether> walk_;
  uint32_t block_elements_;
  Inputs inputs_;
  // Of what this thread copies, offsets in a tile and in a block.
  uint32_t step_offset_, output_offset_, weight_offset_[kWeightCopies];
  // Of the operands that this lane loads, in a slot.
  uint32_t rows_offset_[kSlotProducts<T>], operand_offset_[kWeightAddresses];
  float sums_[kRowTiles][kOutputs / 8][4] = {};
};

}  // namespace fastprune
