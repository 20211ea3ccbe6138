// The gradient of block_sparse_linear in the kept blocks of its weight (a sampled dense-dense
// product):
//
//   grad_values[k][c][r] = sum_n input[n, col_k * cols + c] * grad_output[n, row_k * rows + r]
//
// input       [samples, in_features], rows may be strided
// grad_output [samples, out_features], rows may be strided
// grad_values [kept][cols][rows], must not alias an argument; padded rows and columns are set to
// zero
//
// Sums accumulate in T, in the order of the samples, so the bits do not depend on the number of
// threads. On CUDA they accumulate in float, also for 16-bit T, in slices of the samples that
// depend on the sizes alone, and whose sums are added in order.
#pragma once

#include "types.h"

namespace fastprune {

template <class T>
struct BlockSparseLinearWeightGradientArgs {
  MatrixView<const T> input;
  MatrixView<const T> grad_output;
  const int32_t* crow_indices;  // as in BlockSparseView
  const int32_t* col_indices;
  int64_t block_rows;
  int64_t rows;
  int64_t cols;
  T* grad_values;
};

// How the work is cut: positions are kept blocks, all of equal cost.
struct BlockSparseLinearWeightGradientWork {
  int64_t samples_per_tile;
  int64_t total;
  int64_t scratch_size;  // elements that each thread needs
};

}  // namespace fastprune
