// Plain views that cross from the bindings to the kernels. No torch, no Python, no ownership:
// every pointer belongs to the caller and outlives the call.
#pragma once

#include <cstdint>

namespace fastprune {

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

enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

}  // namespace fastprune
