// Walks the union of the sources of several strips of outputs, in increasing order, a slot of 16
// steps at a time. Every warp walks by itself and finds the same: lane l follows strip l % kStrips.
#pragma once

#include "../block_product.h"
#include "shared_tiles.cuh"

namespace fastprune {

template <int kStrips>
class StripWalk {
 public:
  // Strip s has `strip_outputs` outputs from first_output + s * strip_outputs on, all of one list;
  // past the last list a strip is empty.
  template <class T>
  __device__ __forceinline__ StripWalk(const BlockLists<T>& weight, int64_t first_output,
                                       int strip_outputs, int lane)
      : sources_(weight.sources), blocks_(weight.blocks), steps_(static_cast<int>(weight.steps)) {
    const int64_t list = (first_output + lane % kStrips * strip_outputs) / weight.outputs;
    if (list < weight.lists) {
      next_ = weight.offsets[list];
      end_ = weight.offsets[list + 1];
    }
    fetch();
    take();
    find_least();
  }

  // Bit s: strip s has a block at the source of this slot. 0: the walk is over.
  __device__ __forceinline__ uint32_t mask() const { return mask_; }

  // The input's column at which the slot begins.
  __device__ __forceinline__ int64_t input_column() const {
    return int64_t{least_} * steps_ + step_;
  }

  // The step of the block at which the slot begins.
  __device__ __forceinline__ int step() const { return step_; }

  // The block of a strip whose bit is set; all lanes must ask.
  __device__ __forceinline__ int32_t block(int strip) const {
    return kStrips == 1 ? block_ : __shfl_sync(~0u, block_, strip);
  }

  __device__ __forceinline__ void advance() {
    step_ += kSlotSteps;
    if (step_ < steps_) return;
    step_ = 0;
    if (source_ == least_) take();
    find_least();
  }

 private:
  static constexpr int32_t kNone = 2147483647;

  // One entry ahead of the one in use, so that no slot waits for an index.
  __device__ __forceinline__ void fetch() {
    next_source_ = next_ < end_ ? sources_[next_] : kNone;
    next_block_ = next_ < end_ && blocks_ ? blocks_[next_] : next_;
    ++next_;
  }

  __device__ __forceinline__ void take() {
    source_ = next_source_;
    block_ = next_block_;
    fetch();
  }

  __device__ __forceinline__ void find_least() {
    if constexpr (kStrips == 1) {
      least_ = source_;
      mask_ = source_ != kNone;
    } else {
      least_ = __reduce_min_sync(~0u, source_);
      const bool kept = source_ == least_ && source_ != kNone;
      mask_ = __ballot_sync(~0u, kept) & ((1u << kStrips) - 1);
    }
  }

  const int32_t* sources_;
  const int32_t* blocks_;
  int steps_, step_ = 0;
  int32_t next_ = 0, end_ = 0;
  int32_t source_, block_, next_source_, next_block_, least_;
  uint32_t mask_;
};

}  // namespace fastprune
