// Plain views that cross from the bindings to the kernels. No torch, no Python, no ownership:
// every pointer belongs to the caller and outlives the call.
#pragma once

#include <cstdint>

namespace fastprune {

// 16-bit floating-point numbers by their bits: 8 bits of exponent and 7 of mantissa, or 5 and 10.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A matrix whose columns are contiguous; row_stride counts elements, and is larger than cols
// when the caller passes a slice.
template <class T>
struct MatrixView {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
};

// A block-sparse matrix in BCSR order, seen as block_rows x block_cols blocks of rows x cols
// elements. Edge blocks are padded with zeros to the full block.
template <class T>
struct BlockSparseView {
  // [kept][cols][rows]: inside a block the outputs lie side by side, so that one vector load
  // brings the weights of neighbouring outputs for one input.
  const T* packed_values;
  const int32_t* crow_indices;  // [block_rows + 1], non-decreasing, first 0, last `kept`
  const int32_t* col_indices;   // [kept], strictly increasing within a block row
  int64_t block_rows;
  int64_t rows;
  int64_t cols;
};

// Images [images, channels, height, width] in any memory format: strides count elements.
template <class T>
struct ImageView {
  T* data;
  int64_t images;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t image_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
};

enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu, kRelu6 };

}  // namespace fastprune
