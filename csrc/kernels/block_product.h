// The product that block_sparse_linear and its input gradient share:
//
//   output[n, p * outputs + a] = activation(bias[p * outputs + a] +
//       sum over entries j of list p, steps b: input[n, sources[j] * steps + b] * block_j[a][b])
//
// Forward: a list is a block row, a step is a column of a block. Input gradient: a list is a block
// column, a step is a row, and the input is the gradient of the output.
#pragma once

#include "types.h"

namespace fastprune {

// The lists of blocks; `block_j[a][b]` is values[blocks[j] * outputs * steps + a * output_stride +
// b * step_stride]. The sources of a list increase.
template <class T>
struct BlockLists {
  const T* values;
  const int32_t* offsets;  // [lists + 1], non-decreasing
  const int32_t* sources;  // [entries]
  const int32_t* blocks;   // [entries], null where entry j is block j
  int64_t lists;
  int64_t outputs;
  int64_t steps;
  int64_t output_stride;
  int64_t step_stride;
};

// W: how the weights are stored; 16-bit ones are widened, which is exact.
template <class T, class W>
struct MixedBlockProductArgs {
  MatrixView<const T> input;  // columns past the last one count as zeros
  BlockLists<W> weight;
  const T* bias;         // [output.cols] or null
  MatrixView<T> output;  // outputs past the last column are not stored
  Activation activation;
};

// A template of one type, as the CUDA kernels take it.
template <class T>
struct BlockProductArgs : MixedBlockProductArgs<T, T> {};

}  // namespace fastprune
