// What the product of ../block_product.h reads and writes where it is a convolution
// (block_sparse_conv2d_geometry.h). No patch is ever copied together: each sample's pixel of a tap
// is found from the position alone, and what lies outside of the image is filled in as zeros.
#pragma once

#include "block_product_operands.cuh"
#include "block_sparse_conv2d_geometry.h"
#include "block_sparse_linear_plan.h"

namespace fastprune {

// n / divisor, of n below 2^31.
__device__ __forceinline__ uint32_t quotient(uint32_t n, const Divisor& divisor) {
  return __umulhi(2 * n, divisor.multiplier) >> divisor.shift;
}

struct QuotientAndRest {
  uint32_t quotient, rest;
};

__device__ __forceinline__ QuotientAndRest divide(uint32_t n, const Divisor& divisor) {
  const uint32_t result = quotient(n, divisor);
  return {result, n - result * divisor.divisor};
}

struct Position {
  uint32_t image, row, column;
};

__device__ __forceinline__ Position position_of(const PatchGeometry& geometry, uint32_t sample) {
  const auto [line, column] = divide(sample, geometry.output_width);
  const auto [image, row] = divide(line, geometry.output_height);
  return {image, row, column};
}

// What a source reads, relative to the pixel of a sample.
struct TapPlace {
  int32_t row, column;
  uint32_t group, block;
};

__device__ __forceinline__ TapPlace tap_place(const PatchGeometry& geometry, uint32_t source) {
  const auto [taps, block] = divide(source, geometry.sources_per_tap);
  const auto [group, tap] = divide(taps, geometry.taps);
  const auto [y, x] = divide(tap, geometry.taps_across);
  return {geometry.first_row + static_cast<int32_t>(y) * geometry.row_spacing,
          geometry.first_column + static_cast<int32_t>(x) * geometry.column_spacing, group, block};
}

// Sources of different groups differ, so that lists of several groups can be walked together.
template <class T>
__device__ __forceinline__ ListEntries entries_of(const ConvolutionProductArgs<T>& args,
                                                  uint32_t list) {
  const PatchGeometry& geometry = args.input;
  const int32_t* offsets = args.weight.offsets + int64_t{list} * geometry.list_stride;
  const uint32_t group = list / static_cast<uint32_t>(geometry.lists_per_group);
  return {offsets[geometry.list_begin], offsets[geometry.list_end],
          static_cast<int32_t>(group * geometry.taps.divisor * geometry.sources_per_tap.divisor)};
}

template <class T, int kRows, bool kAligned>
class InputRows<ConvolutionProductArgs, T, kRows, kAligned> {
 public:
  // The slot's first channel within its group, and where its tap reads: distances in rows, columns
  // and, of this channel, elements.
  struct Place {
    uint32_t column;
    int32_t tap_row, tap_column, offset;
  };

  __device__ __forceinline__ InputRows(const ConvolutionProductArgs<T>& args, int64_t first_sample,
                                       int row, int rows_apart, int chunk)
      : geometry_(args.input),
        columns_(static_cast<uint32_t>(args.input.cols) - chunk * kChunkElements<T>) {
    const int64_t last = args.input.rows - first_sample - 1;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      // Samples that do not exist repeat the last one, and are never stored.
      const int64_t sample = first_sample + min(last, int64_t{row + i * rows_apart});
      const Position position = position_of(geometry_, static_cast<uint32_t>(sample));
      row_[i] = static_cast<int32_t>(position.row) * geometry_.row_step;
      column_[i] = static_cast<int32_t>(position.column) * geometry_.column_step;
      input_[i] = args.input.data + position.image * geometry_.image_size +
                  (int64_t{row_[i]} * geometry_.width + column_[i]) * int64_t{geometry_.channels} +
                  chunk * kChunkElements<T>;
    }
  }

  template <class Walk>
  __device__ __forceinline__ Place place_of(const Walk& walk) const {
    const TapPlace tap = tap_place(geometry_, walk.source());
    const uint32_t channel = tap.block * walk.block_steps() + walk.step();
    return {channel, tap.row, tap.column,
            (tap.row * geometry_.width + tap.column) * geometry_.channels +
                static_cast<int32_t>(tap.group * static_cast<uint32_t>(geometry_.cols) + channel)};
  }

  __device__ __forceinline__ int columns_from(const Place& place) const {
    return static_cast<int>(columns_ - place.column);
  }

  __device__ __forceinline__ void copy(int i, uint32_t target, bool wanted,
                                       const Place& place) const {
    const bool inside =
        static_cast<uint32_t>(row_[i] + place.tap_row) < static_cast<uint32_t>(geometry_.height) &&
        static_cast<uint32_t>(column_[i] + place.tap_column) <
            static_cast<uint32_t>(geometry_.width);
    const int columns = columns_from(place);
    const T* source = input_[i] + place.offset;
    if constexpr (kAligned) {
      copy_async_where(wanted, target, source, inside && columns > 0 ? 16 : 0);
    } else if (wanted) {
      carry_chunk(target, source, inside ? valid_in_chunk<T>(columns) : 0);
    }
  }

 private:
  const PatchGeometry& geometry_;
  const T* input_[kRows];               // of the samples' pixels, at channel 0
  int32_t row_[kRows], column_[kRows];  // of these pixels
  uint32_t columns_;                    // channels of a group, from this thread's chunk on
};

template <class T>
class InputTile<ConvolutionProductArgs, T> {
 public:
  struct Place {
    int64_t column;
    int32_t tap_row, tap_column;
    int64_t channel;  // of all groups
  };

 private:
  struct alignas(16) Pixel {
    int64_t image;  // where it begins
    int32_t row, column;
  };

 public:
  struct Column {
    const PatchView<T>& input;
    const Place& place;
    int step;
    const Pixel* pixels;

    __device__ __forceinline__ float value(int sample) const {
      const Pixel pixel = pixels[sample];
      const int32_t row = pixel.row + place.tap_row, column = pixel.column + place.tap_column;
      if (static_cast<uint32_t>(row) >= static_cast<uint32_t>(input.height) ||
          static_cast<uint32_t>(column) >= static_cast<uint32_t>(input.width)) {
        return 0.0f;
      }
      return to_float(
          input.data[pixel.image + (int64_t{row} * input.width + column) * input.channels +
                     place.channel + step]);
    }
  };

  __device__ __forceinline__ InputTile(const ConvolutionProductArgs<T>& args, int64_t first_sample)
      : input_(args.input) {
    __shared__ Pixel pixels[kLinearTileSamples];
    pixels_ = pixels;
    const int64_t sample = first_sample + threadIdx.x;
    if (threadIdx.x < kLinearTileSamples && sample < args.input.rows) {
      const Position position = position_of(input_, static_cast<uint32_t>(sample));
      pixels[threadIdx.x] = {position.image * input_.image_size,
                             static_cast<int32_t>(position.row) * input_.row_step,
                             static_cast<int32_t>(position.column) * input_.column_step};
    }
    __syncthreads();
  }

  __device__ __forceinline__ Place place_of(int32_t source, int block_steps) const {
    const TapPlace tap = tap_place(input_, source);
    const int64_t channel = int64_t{tap.block} * block_steps;
    return {channel, tap.row, tap.column, tap.group * input_.cols + channel};
  }

  __device__ __forceinline__ Column column(const Place& place, int step) const {
    return {input_, place, step, pixels_};
  }

 private:
  const PatchView<T>& input_;
  const Pixel* pixels_;
};

template <class T>
__device__ __forceinline__ OutputColumns output_columns(const ConvolutionProductArgs<T>& args,
                                                        int64_t output, int64_t most) {
  const PositionGeometry& geometry = args.output;
  const auto [group, within] = divide(static_cast<uint32_t>(output), geometry.group_cols);
  const int64_t channels = geometry.group_channels;
  // Past the last group there are no outputs either.
  const int64_t left = output < geometry.cols ? channels - within : 0;
  return {group * channels + within, static_cast<int>(min(left, most)), channels % 4 == 0};
}

template <class T>
class OutputRows<ConvolutionProductArgs, T> {
 public:
  __device__ __forceinline__ OutputRows(const ConvolutionProductArgs<T>& args, int64_t sample,
                                        int64_t column)
      : args_(args), sample_(static_cast<uint32_t>(sample)), column_(column) {}

  __device__ __forceinline__ T* target() const {
    const Position position = position_of(args_.input, sample_);
    const PositionGeometry& geometry = args_.output;
    return args_.output.data + (geometry.first + position.image * geometry.image_stride +
                                position.row * geometry.row_stride +
                                position.column * geometry.column_stride + column_);
  }
  __device__ __forceinline__ void advance(int samples) { sample_ += samples; }

 private:
  const ConvolutionProductArgs<T>& args_;
  uint32_t sample_;
  int64_t column_;
};

}  // namespace fastprune
