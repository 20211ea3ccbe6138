// What the products of ../block_product.h read and write where their input and their output are
// matrices. (block_sparse_conv2d_operands.cuh: where they are images.)
#pragma once

#include "../block_product.h"
#include "conversion.cuh"
#include "shared_tiles.cuh"

namespace fastprune {

// The entries of a list: [begin, end). `first_source` is added to their sources.
struct ListEntries {
  int32_t begin, end, first_source;
};

template <class T>
__device__ __forceinline__ ListEntries entries_of(const BlockProductArgs<T>& args, uint32_t list) {
  return {args.weight.offsets[list], args.weight.offsets[list + 1], 0};
}

// The rows of the input of which a thread copies one chunk each. kAligned: the rows of the input
// begin, and all end, at multiples of 16 bytes.
template <template <class> class Args, class T, int kRows, bool kAligned>
class InputRows;

template <class T, int kRows, bool kAligned>
class InputRows<BlockProductArgs, T, kRows, kAligned> {
 public:
  // Where in the input a slot begins.
  struct Place {
    uint32_t column;
  };

  // Rows `row`, `row` + rows_apart, ... of those from first_sample on.
  __device__ __forceinline__ InputRows(const BlockProductArgs<T>& args, int64_t first_sample,
                                       int row, int rows_apart, int chunk)
      : columns_(static_cast<uint32_t>(args.input.cols) - chunk * kChunkElements<T>) {
    const int64_t last = args.input.rows - first_sample - 1;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      // Samples that do not exist repeat the last one, and are never stored.
      const int64_t sample = first_sample + min(last, int64_t{row + i * rows_apart});
      input_[i] = args.input.data + sample * args.input.row_stride + chunk * kChunkElements<T>;
      // Else the compiler keeps the offset, and adds the address of the input in each slot.
      if constexpr (kAligned) asm("" : "+l"(input_[i]));
    }
  }

  template <class Walk>
  __device__ __forceinline__ Place place_of(const Walk& walk) const {
    return {static_cast<uint32_t>(walk.source()) * walk.block_steps() + walk.step()};
  }

  // How many of the input's columns lie from this thread's chunk of a slot on.
  __device__ __forceinline__ int columns_from(const Place& place) const {
    return static_cast<int>(columns_ - place.column);
  }

  __device__ __forceinline__ void copy(int i, uint32_t target, bool wanted,
                                       const Place& place) const {
    const int columns = columns_from(place);
    if constexpr (kAligned) {
      copy_async_where(wanted, target, input_[i] + place.column, columns > 0 ? 16 : 0);
    } else if (wanted) {
      carry_chunk(target, input_[i] + place.column, valid_in_chunk<T>(columns));
    }
  }

 private:
  const T* input_[kRows];  // at column 0
  uint32_t columns_;       // from this thread's chunk on
};

// The input that the plain kernel reads: a tile of samples from first_sample on.
template <template <class> class Args, class T>
class InputTile;

template <class T>
class InputTile<BlockProductArgs, T> {
 public:
  // Where in the input a block begins.
  struct Place {
    int64_t column;
  };

  struct Column {
    const T* data;
    int64_t row_stride;
    __device__ __forceinline__ float value(int sample) const {
      return to_float(data[sample * row_stride]);
    }
  };

  __device__ __forceinline__ InputTile(const BlockProductArgs<T>& args, int64_t first_sample)
      : data_(args.input.data + first_sample * args.input.row_stride),
        row_stride_(args.input.row_stride) {}

  __device__ __forceinline__ Place place_of(int32_t source, int block_steps) const {
    return {int64_t{source} * block_steps};
  }

  __device__ __forceinline__ Column column(const Place& place, int step) const {
    return {data_ + place.column + step, row_stride_};
  }

 private:
  const T* data_;
  int64_t row_stride_;
};

// The columns of `most` outputs from `output` on: how many of them exist, and their place in a row
// of the output and in the bias.
struct OutputColumns {
  int64_t first;
  int count;
  bool aligned;  // four of them may be stored together
};

template <class T>
__device__ __forceinline__ OutputColumns output_columns(const BlockProductArgs<T>& args,
                                                        int64_t output, int64_t most) {
  return {output, static_cast<int>(min(args.output.cols - output, most)),
          args.output.row_stride % 4 == 0};
}

// Walks rows of the output, at one column.
template <template <class> class Args, class T>
class OutputRows;

template <class T>
class OutputRows<BlockProductArgs, T> {
 public:
  __device__ __forceinline__ OutputRows(const BlockProductArgs<T>& args, int64_t sample,
                                        int64_t column)
      : target_(args.output.data + sample * args.output.row_stride + column),
        row_stride_(args.output.row_stride) {}

  __device__ __forceinline__ T* target() const { return target_; }
  __device__ __forceinline__ void advance(int samples) { target_ += samples * row_stride_; }

 private:
  T* target_;
  int64_t row_stride_;
};

}  // namespace fastprune
