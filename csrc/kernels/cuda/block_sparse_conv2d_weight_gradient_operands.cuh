// What stands for the inputs of a convolution in the weight gradient's kernels: channels-last
// images. A sample is an output position; a kept column is a tap and a channel, and its input at
// a position is one pixel's, or zero outside of the image. Neighbouring columns of one block are
// neighbouring channels of one tap, so a chunk of 16 bytes is of one tap, while the columns of a
// tile may be of many.
#pragma once

#include "block_sparse_conv2d_weight_gradient.h"
#include "block_sparse_linear_weight_gradient_operands.cuh"
#include "convolution_positions.cuh"

namespace fastprune {

template <class T>
struct ImageInput {
  using Type = T;
  using Args = BlockSparseConv2dWeightGradientCudaArgs<T>;

  struct Place {
    uint32_t tap;
    int channel;  // of the group; from its last on they are padding
  };

  static __device__ __forceinline__ Place place_of(const Args& args, const GradientTile& tile,
                                                   int column) {
    const auto cols = static_cast<uint32_t>(args.gradient.cols);
    const auto channel_blocks = static_cast<uint32_t>(args.channel_blocks);
    const uint32_t block = static_cast<uint32_t>(column) / cols;
    const uint32_t index = args.gradient.col_indices[tile.first_block + block];
    const uint32_t tap = index / channel_blocks;
    return {tap, static_cast<int>((index - tap * channel_blocks) * cols + column - block * cols)};
  }

  static __device__ __forceinline__ bool exists(const Args& args, const GradientTile& tile,
                                                int column) {
    return place_of(args, tile, column).channel < args.gradient.input.cols;
  }

  // Where the channel lies in the first pixel.
  static __device__ __forceinline__ const T* channel_data(const Args& args,
                                                          const GradientTile& tile, int channel) {
    const auto group_outputs = static_cast<uint32_t>(args.group_outputs);
    const uint32_t group = static_cast<uint32_t>(tile.first_output) / group_outputs;
    return args.gradient.input.data + group * args.gradient.input.cols + channel;
  }

  // Of one channel's data. Both factors have 32 bits: one instruction.
  static __device__ __forceinline__ const T* at_pixel(const Args& args, const T* data,
                                                      uint32_t pixel) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(data) +
                                      uint64_t{pixel} * args.pixel_bytes);
  }

  template <bool kAligned>
  struct Copies : OperandCopies<T, kGradientTileColumns, kAligned> {
    using Base = OperandCopies<T, kGradientTileColumns, kAligned>;
    const Args& args;
    const T* data = nullptr;
    PixelWalk walk;

    __device__ __forceinline__ explicit Copies(const Args& kernel_args)
        : Base(0), args(kernel_args) {}

    __device__ __forceinline__ void start(const GradientTile& tile, const GradientSlice& slice,
                                          int column) {
      const Place place = place_of(args, tile, column);
      data = channel_data(args, tile, place.channel);
      const auto channels = static_cast<int>(args.gradient.input.cols);
      this->elements = max(min(channels - place.channel, Base::kElements), 0);
      walk.start(args.positions, place.tap, static_cast<uint32_t>(slice.begin + this->sample));
    }

    __device__ __forceinline__ void copy(uint4* tile, int samples) {
      // The places of samples so far apart differ by their rows alone.
      static_assert(Base::kApart <= Base::kSamples && Base::kApart * sizeof(T) == 16);
      uint4* to = tile + chunk_place<T, Base::kChunks>(this->sample, this->chunk);
#pragma unroll
      for (int s = 0; s < Base::kSamples; s += Base::kApart) {
        const bool exists =
            walk.is_inside(args.positions, (this->sample + s < samples) & (this->elements > 0));
        const T* from = at_pixel(args, data, walk.pixel);
        Base::copy_chunk(to + s * Base::kChunks, from, exists ? this->elements : 0);
        walk.advance(args.positions);
      }
    }
  };

  struct Column {
    const Args& args;
    const T* data = nullptr;
    PixelWalk walk;

    __device__ __forceinline__ explicit Column(const Args& kernel_args) : args(kernel_args) {}

    __device__ __forceinline__ void start(const GradientTile& tile, const GradientSlice& slice,
                                          int column) {
      const Place place = place_of(args, tile, column);
      if (place.channel >= args.gradient.input.cols) return;
      data = channel_data(args, tile, place.channel);
      walk.start(args.positions, place.tap, static_cast<uint32_t>(slice.begin));
    }

    // Of one position after the other; zero from the slice's end on.
    __device__ __forceinline__ float next(int sample, int samples) {
      const bool exists = walk.is_inside(args.positions, (sample < samples) & (data != nullptr));
      const float value = exists ? to_float(*at_pixel(args, data, walk.pixel)) : 0.0f;
      walk.advance(args.positions);
      return value;
    }
  };
};

}  // namespace fastprune
