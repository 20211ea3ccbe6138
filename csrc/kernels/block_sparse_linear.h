// block_sparse_linear: output[n, o] = activation(sum_i input[n, i] * weight[o, i] + bias[o])
//
// input  [samples, in_features], rows may be strided
// weight block-sparse, block_rows * rows >= out_features; padded rows and columns are ignored
// bias   [out_features] or null
// output [samples, out_features], must not alias an argument
//
// Sums accumulate in T, in the order of the kept blocks of a block row, so the bits depend
// neither on the number of threads nor on the other samples.
#pragma once

#include "types.h"

namespace fastprune {

// W: how the weights are stored; on the CPU 16-bit ones are widened to T, which is exact.
template <class T, class W = T>
struct BlockSparseLinearArgs {
  MatrixView<const T> input;
  BlockSparseView<W> weight;
  const T* bias;
  MatrixView<T> output;
  Activation activation;
};

}  // namespace fastprune
