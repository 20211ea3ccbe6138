// The product of ../block_product.h for up to 16 samples, bound by reading the weights: one thread
// block for each strip of 16 outputs.
//
// The slots of a strip (16 steps each, in the order of its list) are dealt to eight warps in turn.
// Each warp copies the weights and inputs of its slots to a ring of its own and multiplies them on
// the tensor cores, without waiting for another warp; then the eight sums are added in the order of
// the warps. The bits depend neither on the schedule nor on the other samples, but differ from
// those of the larger tiles, which add all slots in one chain.
#pragma once

#include "block_product.cuh"

namespace fastprune {

template <class T, bool kStepsTogether>
class FewSamplesProduct {
 public:
  static constexpr int kThreads = 32 * kFewWarps;

  __device__ __forceinline__ explicit FewSamplesProduct(const BlockProductArgs<T>& args)
      : args_(args),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32),
        ring_(reinterpret_cast<T*>(shared_memory() + warp_ * kFewRingBytes)),
        first_output_(int64_t{blockIdx.x} * kFewOutputs),
        slots_per_block_(static_cast<int>(args.weight.steps) / kSlotSteps),
        slot_(warp_) {
    const int64_t list = first_output_ / args.weight.outputs;
    output_in_block_ = static_cast<int>(first_output_ % args.weight.outputs);
    first_entry_ = args.weight.offsets[list];
    slots_ = int64_t{args.weight.offsets[list + 1] - first_entry_} * slots_per_block_;
    aligned_ = ((reinterpret_cast<uintptr_t>(args.input.data) |
                 static_cast<uintptr_t>(args.input.row_stride) * sizeof(T)) %
                16) == 0;
    fetch();
  }

  __device__ __forceinline__ void run() {
    // One copy of the code, which is long, rather than one for each place.
#pragma unroll 1
    for (int place = 0; place + 1 < kPlaces; ++place) copy_slot(place);
    int place = 0;
    for (int64_t slot = warp_; slot < slots_; slot += kFewWarps) {
      wait_for_copies<kPlaces - 2>();
      // All lanes see the slot, and all have left the one that is filled next.
      __syncwarp();
      copy_slot(place == 0 ? kPlaces - 1 : place - 1);
      multiply(ring_ + place * kPlaceElements);
      place = place + 1 == kPlaces ? 0 : place + 1;
    }
    // All slots are used and their copies waited for; the sums are written over them.
    __syncthreads();
    add_warps();
  }

 private:
  static constexpr int kInputElements = kFewSamples * kSlotSteps;
  static constexpr int kPlaceElements = (kFewSamples + kFewOutputs) * kSlotSteps;
  static constexpr int kPlaces = kFewRingBytes / static_cast<int>(kPlaceElements * sizeof(T));
  static_assert(kPlaces >= 3);
  // Chunks of 16 rows; both tiles have as many.
  static constexpr int kChunks = 16 * StepTile<T>::kChunks;

  // The source of the next slot is read one slot ahead.
  __device__ __forceinline__ void fetch() {
    if (slot_ >= slots_) return;
    const auto entry = static_cast<int32_t>(slot_ / slots_per_block_);
    next_source_ = args_.weight.sources[first_entry_ + entry];
    next_block_ =
        args_.weight.blocks ? args_.weight.blocks[first_entry_ + entry] : first_entry_ + entry;
  }

  __device__ __forceinline__ void copy_slot(int place) {
    if (slot_ < slots_) {
      const int step = static_cast<int>(slot_ % slots_per_block_) * kSlotSteps;
      const int64_t column = next_source_ * args_.weight.steps + step;
      const T* block =
          args_.weight.values + next_block_ * (args_.weight.outputs * args_.weight.steps);
      slot_ += kFewWarps;
      fetch();
      const auto steps = static_cast<int>(min(args_.input.cols - column, int64_t{kSlotSteps}));
      T* inputs = ring_ + place * kPlaceElements;
#pragma unroll
      for (int i = lane_; i < kChunks; i += 32) {
        const int row = i / StepTile<T>::kChunks, chunk = i % StepTile<T>::kChunks;
        const int valid = valid_in_chunk<T>(steps - chunk * kChunkElements<T>);
        // Samples that do not exist are 0 in the tile, and never stored.
        copy_chunk(
            inputs + StepTile<T>::offset(row, chunk),
            args_.input.data + row * args_.input.row_stride + column + chunk * kChunkElements<T>,
            row < args_.input.rows ? valid : 0, aligned_);
        T* weights = inputs + kInputElements;
        if constexpr (kStepsTogether) {
          copy_chunk(weights + StepTile<T>::offset(row, chunk),
                     block + (output_in_block_ + row) * args_.weight.steps + step +
                         chunk * kChunkElements<T>,
                     valid, true);
        } else {
          copy_chunk(weights + OutputTile<T, kFewOutputs>::offset(row, chunk),
                     block + (step + row) * args_.weight.outputs + output_in_block_ +
                         chunk * kChunkElements<T>,
                     row < steps ? kChunkElements<T> : 0, true);
        }
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void multiply(const T* inputs) {
    const T* weights = inputs + kInputElements;
#pragma unroll
    for (int product = 0; product < kSlotProducts<T>; ++product) {
      uint32_t rows[4], outputs[4];
      load_rows<T>(rows, inputs, 0, product, lane_);
      if constexpr (kStepsTogether) {
        load_step_outputs<T>(outputs, weights, 0, product, lane_);
      } else {
        load_outputs<T, kFewOutputs>(outputs, weights, 0, product, lane_);
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
    const int sample = thread / kFewOutputs, column = thread % kFewOutputs;
    const int64_t output = first_output_ + column;
    if (sample >= args_.output.rows || output >= args_.output.cols) return;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kFewWarps; ++warp) {
      sum += memory[warp * kWarpSums + sample * kRow + column];
    }
    if (args_.bias) sum += to_float(args_.bias[output]);
    args_.output.data[sample * args_.output.row_stride + output] =
        from_float<T>(activate(sum, args_.activation));
  }

  const BlockProductArgs<T>& args_;
  int lane_, warp_;
  T* ring_;
  int64_t first_output_;
  int slots_per_block_;
  int64_t slot_, slots_;  // the next slot of this warp; all of the strip
  int output_in_block_;
  int32_t first_entry_, next_source_ = 0, next_block_ = 0;
  bool aligned_;
  float sums_[2][4] = {};
};

}  // namespace fastprune
