// Walks the union of the sources of several strips of outputs, in increasing order, a slot of 16
// steps at a time. Every warp walks by itself and finds the same: lane l follows strip l % kStrips.
#pragma once

#include "block_product_operands.cuh"

namespace fastprune {

// kListsBlocks: entry j is block blocks[j], not block j.
template <int kStrips, bool kListsBlocks>
class StripWalk {
 public:
  // Strip s has `strip_outputs` outputs from first_output + s * strip_outputs on, all of one list;
  // past the last list a strip is empty.
  template <class Args>
  __device__ __forceinline__ StripWalk(const Args& args, uint32_t first_output, int strip_outputs,
                                       int lane)
      : sources_(args.weight.sources),
        blocks_(args.weight.blocks),
        steps_(static_cast<int>(args.weight.steps)) {
    const uint32_t list = (first_output + lane % kStrips * strip_outputs) /
                          static_cast<uint32_t>(args.weight.outputs);
    if (list < static_cast<uint32_t>(args.weight.lists)) {
      const ListEntries entries = entries_of(args, list);
      entry_ = entries.begin;
      end_ = entries.end;
      first_source_ = entries.first_source;
    }
    fetch(true);
    take(true);
    find_least();
  }

  // Bit s: strip s has a block at the source of this slot. 0: the walk is over, and stays so.
  __device__ __forceinline__ uint32_t mask() const { return mask_; }

  // The source of the slot, and the step of its blocks at which it begins.
  __device__ __forceinline__ int32_t source() const { return least_; }
  __device__ __forceinline__ int step() const { return step_; }
  __device__ __forceinline__ int block_steps() const { return steps_; }

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
    const int32_t otherwise = wanted ? kNone : next_source_;
    next_source_ = load_where(exists, sources_ + entry_, otherwise - first_source_) + first_source_;
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
  int32_t entry_ = 0, end_ = 0, first_source_ = 0;
  int32_t source_ = kNone, block_ = 0, next_source_ = kNone, next_block_ = 0, least_;
  uint32_t mask_;
};

}  // namespace fastprune
