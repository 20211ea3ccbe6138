// The product of ../block_product.h for few samples, bound by reading the weights: one thread block
// for each strip of 16 outputs and 16 samples.
//
// The slots of a strip (16 steps each, in the order of its list) are dealt to eight warps in turn.
// Each warp copies the weights and inputs of its slots to a ring of its own and multiplies them on
// the tensor cores, without waiting for another warp; then the eight sums are added in the order of
// the warps. The bits depend neither on the schedule nor on the other samples, but differ from
// those of the larger tiles, which add all slots in one chain.
#pragma once

#include "block_product.cuh"

namespace fastprune {

template <class T, bool kStepsTogether, bool kAligned>
class FewSamplesProduct {
 public:
  static constexpr int kThreads = 32 * kFewWarps;

  __device__ __forceinline__ explicit FewSamplesProduct(const BlockProductArgs<T>& args)
      : args_(args),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32),
        ring_(shared_address(shared_memory()) + warp_ * kFewRingBytes),
        // Neighbouring thread blocks share their weights, which are read from memory once.
        first_output_(blockIdx.x / sample_tiles() * kFewOutputs),
        first_sample_(int64_t{blockIdx.x % sample_tiles()} * kFewSamples),
        block_slots_(static_cast<int>(args.weight.steps) / kSlotSteps),
        block_elements_(static_cast<uint32_t>(args.weight.outputs * args.weight.steps)) {
    const auto outputs = static_cast<uint32_t>(args.weight.outputs);
    const int32_t first = args.weight.offsets[first_output_ / outputs];
    end_ = args.weight.offsets[first_output_ / outputs + 1];
    slots_ = (end_ - first) * block_slots_;
    entry_ = first + warp_ / block_slots_;
    slot_ = warp_ % block_slots_;
    const int chunk = lane_ % Steps::kChunks;
    columns_ = static_cast<uint32_t>(args.input.cols) - chunk * kChunkElements<T>;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t row = lane_ / Steps::kChunks + i * kRowsAtOnce;
      // Samples that do not exist repeat the last one, and are never stored.
      const int64_t sample = min(args.input.rows - 1, first_sample_ + row);
      input_[i] = args.input.data + sample * args.input.row_stride + chunk * kChunkElements<T>;
      const uint32_t output = first_output_ % outputs;
      weight_offset_[i] =
          chunk * kChunkElements<T> +
          (kStepsTogether ? (output + row) * args.weight.steps : row * outputs + output);
    }
    fetch();
  }

  __device__ __forceinline__ void run() {
    uint32_t empty = ring_;
    // One copy of the code, which is long, rather than one for each place.
#pragma unroll 1
    for (int place = 0; place + 1 < kPlaces; ++place) {
      copy_slot(empty);
      empty += kPlaceBytes;
    }
    uint32_t full = ring_;
    for (int slot = warp_; slot < slots_; slot += kFewWarps) {
      wait_for_copies<kPlaces - 2>();
      // All lanes see the slot, and all have left the one that is filled next.
      __syncwarp();
      copy_slot(empty);
      multiply(full);
      empty = full;
      full = full == ring_ + (kPlaces - 1) * kPlaceBytes ? ring_ : full + kPlaceBytes;
    }
    // All slots are used and their copies waited for; the sums are written over them.
    __syncthreads();
    add_warps();
  }

 private:
  using Steps = StepTile<T>;
  using Outputs = OutputTile<T, kFewOutputs>;
  // Chunks of 16 rows; all tiles have as many.
  static_assert(kFewSamples == 16 && kFewOutputs == 16 && Outputs::kChunks == Steps::kChunks);
  static constexpr int kRowsAtOnce = 32 / Steps::kChunks;
  static constexpr int kCopies = 16 / kRowsAtOnce;
  static constexpr int kInputBytes = 16 * Steps::kRowBytes;
  static constexpr int kPlaceBytes = 2 * kInputBytes;
  static constexpr int kPlaces = kFewRingBytes / kPlaceBytes;
  static_assert(kPlaces >= 3);

  __device__ __forceinline__ uint32_t sample_tiles() const {
    return static_cast<uint32_t>((args_.input.rows + kFewSamples - 1) / kFewSamples);
  }

  // The source of the next slot is read one slot ahead.
  __device__ __forceinline__ void fetch() {
    if (entry_ >= end_) return;
    source_ = args_.weight.sources[entry_];
    block_ = kStepsTogether ? args_.weight.blocks[entry_] : entry_;
  }

  __device__ __forceinline__ void copy_slot(uint32_t place) {
    const bool wanted = entry_ < end_;
    const int step = slot_ * kSlotSteps;
    const uint32_t column = source_ * static_cast<uint32_t>(args_.weight.steps) + step;
    const auto columns = static_cast<int>(columns_ - column);
    const uint32_t block =
        block_ * block_elements_ +
        step * (kStepsTogether ? 1 : static_cast<uint32_t>(args_.weight.outputs));
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = lane_ / Steps::kChunks + i * kRowsAtOnce, chunk = lane_ % Steps::kChunks;
      const uint32_t inputs = place + Steps::offset(row, chunk);
      if constexpr (kAligned) {
        copy_async_where(wanted, inputs, input_[i] + column, columns > 0 ? 16 : 0);
      } else if (wanted) {
        carry_chunk(inputs, input_[i] + column, valid_in_chunk<T>(columns));
      }
      uint32_t weights = place + kInputBytes;
      int valid;
      if constexpr (kStepsTogether) {
        weights += Steps::offset(row, chunk);
        valid = kAligned ? (columns > 0 ? 16 : 0) : valid_in_chunk<T>(columns) * sizeof(T);
      } else {
        weights += Outputs::offset(row, chunk);
        valid = row < static_cast<int>(args_.input.cols) - static_cast<int>(column) ? 16 : 0;
      }
      copy_async_where(wanted, weights, args_.weight.values + (block + weight_offset_[i]), valid);
    }
    commit_copies();
    entry_ += kFewWarps / block_slots_;
    slot_ += kFewWarps % block_slots_;
    if (slot_ >= block_slots_) {
      slot_ -= block_slots_;
      ++entry_;
    }
    fetch();
  }

  __device__ __forceinline__ void multiply(uint32_t inputs) {
    const uint32_t weights = inputs + kInputBytes;
#pragma unroll
    for (int product = 0; product < kSlotProducts<T>; ++product) {
      uint32_t rows[4], outputs[4];
      load_operand<T>(rows, inputs + rows_offset<T>(product, lane_));
      if constexpr (kStepsTogether) {
        load_operand<T>(outputs, weights + step_outputs_offset<T>(product, lane_));
      } else {
        load_outputs<T, kFewOutputs>(outputs, weights + outputs_offset<T, kFewOutputs>(0, lane_),
                                     product);
      }
      multiply_add_pair<T>(sums_[0], sums_[1], rows, outputs);
    }
  }

  __device__ __forceinline__ void add_warps() const {
    constexpr bool kApart = kOddsApart<T, kStepsTogether>;
    constexpr int kRow = kFewOutputs + (kApart ? 0 : 8);
    constexpr int kWarpSums = kFewSamples * kRow;
    static_assert(kWarpSums * sizeof(float) <= kFewRingBytes);
    static_assert(kThreads == kFewSamples * kFewOutputs);
    auto* memory = reinterpret_cast<float*>(shared_memory());
    write_sums<kApart>(memory + warp_ * kWarpSums, kRow, sums_[0], sums_[1], lane_);
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / kFewOutputs, column = thread % kFewOutputs;
    const int64_t sample = first_sample_ + row, output = int64_t{first_output_} + column;
    if (sample >= args_.output.rows || output >= args_.output.cols) return;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kFewWarps; ++warp) {
      sum += memory[warp * kWarpSums + row * kRow + column];
    }
    if (args_.bias) sum += to_float(args_.bias[output]);
    args_.output.data[sample * args_.output.row_stride + output] =
        from_float<T>(activate(sum, args_.activation));
  }

  const BlockProductArgs<T>& args_;
  int lane_, warp_;
  uint32_t ring_;
  uint32_t first_output_;
  int64_t first_sample_;
  int block_slots_;
  uint32_t block_elements_;
  int slots_;            // of the strip
  int32_t entry_, end_;  // of the next slot of this warp; of the list
  int slot_;             // of the entry's block
  int32_t source_ = 0, block_ = 0;
  // Of what this lane copies: its rows at column 0, the input's columns from its chunk on, and
  // offsets in a block.
  const T* input_[kCopies];
  uint32_t columns_, weight_offset_[kCopies];
  float sums_[2][4] = {};
};

}  // namespace fastprune
