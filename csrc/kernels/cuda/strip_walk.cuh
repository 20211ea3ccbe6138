// Walks the union of the sources of several strips of outputs, in increasing order, a slot of 16
// steps at a time. Every warp walks by itself and finds the same: lane l follows strip l % kStrips.
#pragma once

#include "../block_product.h"
#include "shared_tiles.cuh"

namespace fastprune {

// kListsBlocks: entry j is block blocks[j], not block j.
template <int kStrips, bool kListsBlocks>
class StripWalk {
 public:
  // Strip s has `strip_outputs` outputs from first_output + s * strip_outputs on, all of one list;
  // past the last list a strip is empty.
  template <class T>
  __device__ __forceinline__ StripWalk(const BlockLists<T>& weight, uint32_t first_output,
                                       int strip_outputs, int lane)
      : sources_(weight.sources), blocks_(weight.blocks), steps_(static_cast<int>(weight.steps)) {
    const uint32_t list =
        (first_output + lane % kStrips * strip_outputs) / static_cast<uint32_t>(weight.outputs);
    if (list < static_cast<uint32_t>(weight.lists)) {
      entry_ = weight.offsets[list];
      end_ = weight.offsets[list + 1];
    }
    fetch(true);
    take(true);
    find_least();
  }

  // Bit s: strip s has a block at the source of this slot. 0: the walk is over, and stays so.
  __device__ __forceinline__ uint32_t mask() const { return mask_; }

  // The input's column at which the slot begins.
  __device__ __forceinline__ uint32_t input_column() const {
    return static_cast<uint32_t>(least_) * steps_ + step_;
  }

  // The step of the block at which the slot begins.
  __device__ __forceinline__ int step() const { return step_; }

  // The block of a strip whose bit is set; all lanes must ask.
  __device__ __forceinline__ uint32_t block(int strip) const {
    return __shfl_sync(~0u, block_, strip);
  }

  __device__ __forceinline__ void advance() {
    step_ += kSlotSteps;
    if (step_ < steps_) return;
    step_ = 0;
    take(source_ == least_);
    find_least();
  }

 private:
  static constexpr int32_t kNone = 2147483647;

  // Lanes differ, but do not branch. One entry ahead of the one in use, so that no slot waits for
  // an index.
  __device__ __forceinline__ void fetch(bool wanted) {
    const bool exists = wanted && entry_ < end_;
    next_source_ = load_where(exists, sources_ + entry_, wanted ? kNone : next_source_);
    if constexpr (kListsBlocks) next_block_ = load_where(exists, blocks_ + entry_, next_block_);
    entry_ += wanted;
  }

  __device__ __forceinline__ void take(bool wanted) {
    if (wanted) source_ = next_source_;
    if (wanted) block_ = kListsBlocks ? next_block_ : entry_ - 1;
    fetch(wanted);
  }

  __device__ __forceinline__ void find_least() {
    least_ = __reduce_min_sync(~0u, source_);
    const uint32_t kept = __ballot_sync(~0u, source_ == least_) & ((1u << kStrips) - 1);
    mask_ = least_ == kNone ? 0 : kept;
  }

  const int32_t* sources_;
  const int32_t* blocks_;
  int steps_, step_ = 0;
  int32_t entry_ = 0, end_ = 0;
  int32_t source_ = kNone, block_ = 0, next_source_ = kNone, next_block_ = 0, least_;
  uint32_t mask_;
};

}  // namespace fastprune
