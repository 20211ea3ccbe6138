// Where the weight gradient's kernels read their operands. `grad_output` is a matrix; what stands
// for the other one is a class of its own, for which the kernels are templates:
//
//   Args             of the kernel, derived from BlockSparseLinearWeightGradientCudaArgs
//   exists           whether a kept column stands for an input, or is padding
//   Copies<aligned>  what one thread copies to shared memory in each stage, for the tensor cores
//   Column           the samples of one column, for the plain kernel
#pragma once

#include "block_sparse_linear_weight_gradient_tiles.cuh"
#include "ptx.cuh"

namespace fastprune {

// Where a chunk of 16 bytes of a sample lies in a tile of kChunks of them for each sample.
template <class T, int kChunks>
__device__ __forceinline__ int chunk_place(int sample, int chunk) {
  if constexpr (sizeof(T) == 2) {
    constexpr int kSamplesOfLine = kChunks < 8 ? 8 / kChunks : 1;  // 128 bytes: all banks
    chunk ^= sample / kSamplesOfLine % (kChunks < 8 ? kChunks : 8);
  } else {
    chunk ^= kChunks < 8 ? sample & 2 : sample % 4 * 2;
  }
  return sample * kChunks + chunk;
}

// What one thread copies of an operand in each stage: the same chunk of every kApart-th sample.
template <class T, int kTileWidth, bool kAligned>
struct OperandCopies {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kChunks = kTileWidth / kElements;
  static constexpr int kSamples = kGradientStageBytes / sizeof(T);
  static constexpr int kApart = kGradientThreads / kChunks;

  const T* next;  // this thread's chunk in the next stage to be copied
  int64_t row_stride;
  int elements;  // that exist of the chunk; the others are zeros
  int sample, chunk;

  __device__ __forceinline__ OperandCopies(int64_t stride)
      : next(nullptr),
        row_stride(stride),
        elements(0),
        sample(static_cast<int>(threadIdx.x) / kChunks),
        chunk(static_cast<int>(threadIdx.x) % kChunks) {}

  __device__ __forceinline__ void start(const T* data, int64_t first_sample, int64_t column,
                                        int64_t columns) {
    next = data + (first_sample + sample) * row_stride + column;
    elements = static_cast<int>(max(min(columns - column, int64_t{kElements}), int64_t{0}));
  }

  // Samples from `samples` on do not exist, and are zeros.
  __device__ __forceinline__ void copy(uint4* tile, int samples) {
#pragma unroll
    for (int s = 0; s < kSamples; s += kApart) {
      if (kApart > kSamples && sample >= kSamples) break;
      copy_chunk(tile + chunk_place<T, kChunks>(sample + s, chunk), next + s * row_stride,
                 sample + s < samples ? elements : 0);
    }
    next += kSamples * row_stride;
  }

  __device__ __forceinline__ static void copy_chunk(uint4* to, const T* from, int valid) {
    if constexpr (kAligned) {
      // A chunk exists whole or not at all.
      copy_async<16>(to, from, valid > 0 ? 16 : 0);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        copy_async<4>(reinterpret_cast<T*>(to) + i, from + i, i < valid ? 4 : 0);
      }
    } else {
      // No asynchronous copy is as narrow as one element.
      uint32_t bits[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        bits[i] = i < valid ? reinterpret_cast<const uint16_t*>(from)[i] : 0;
      }
      *to = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
             bits[6] | bits[7] << 16};
    }
  }
};

// Inputs that are a matrix, [samples, in_features].
template <class T>
struct MatrixInput {
  using Type = T;
  using Args = BlockSparseLinearWeightGradientCudaArgs<T>;

  static __device__ __forceinline__ bool exists(const Args& args, const GradientTile& tile,
                                                int column) {
    return input_column(args.gradient, tile, column) < args.gradient.input.cols;
  }

  template <bool kAligned>
  struct Copies : OperandCopies<T, kGradientTileColumns, kAligned> {
    using Base = OperandCopies<T, kGradientTileColumns, kAligned>;
    const Args& args;

    __device__ __forceinline__ explicit Copies(const Args& kernel_args)
        : Base(kernel_args.gradient.input.row_stride), args(kernel_args) {}

    __device__ __forceinline__ void start(const GradientTile& tile, const GradientSlice& slice,
                                          int column) {
      const auto& gradient = args.gradient;
      Base::start(gradient.input.data, slice.begin, input_column(gradient, tile, column),
                  gradient.input.cols);
    }
  };

  struct Column {
    const Args& args;
    const T* input = nullptr;

    __device__ __forceinline__ explicit Column(const Args& kernel_args) : args(kernel_args) {}

    __device__ __forceinline__ void start(const GradientTile& tile, const GradientSlice& slice,
                                          int column) {
      const auto& gradient = args.gradient;
      const int64_t place = input_column(gradient, tile, column);
      if (place < gradient.input.cols) {
        input = gradient.input.data + slice.begin * gradient.input.row_stride + place;
      }
    }

    // Of one sample after the other; zero from the slice's end on.
    __device__ __forceinline__ float next(int sample, int samples) {
      const bool exists = input && sample < samples;
      return exists ? to_float(input[sample * args.gradient.input.row_stride]) : 0.0f;
    }
  };
};

}  // namespace fastprune
