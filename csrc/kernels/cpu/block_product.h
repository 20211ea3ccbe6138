// The product that block_sparse_linear's forward and its input gradient share on the CPU:
//
//   output[n, p * outputs + a] = activation(bias[p * outputs + a] +
//       sum over entries j of list p, steps b: input[n, sources[j] * steps + b] * block_j[a][b])
//
// Forward: a list is a block row, a step is a column of a block. Input gradient: a list is a block
// column, a step is a row, and the input is the gradient of the output.
//
// Sums accumulate in T, in the order of the entries, one fused multiply-add for each step
// (baseline: a product and an addition), so the bits depend neither on the number of threads nor on
// the other samples nor on the kernel chosen.
#pragma once

#include "../types.h"

namespace fastprune {

// The lists of blocks; `block_j[a][b]` is values[blocks[j] * outputs * steps + a * output_stride +
// b * step_stride].
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

template <class T>
struct BlockProductArgs {
  MatrixView<const T> input;  // columns past the last one count as zeros
  BlockLists<T> weight;
  const T* bias;         // [output.cols] or null
  MatrixView<T> output;  // outputs past the last column are not stored
  Activation activation;
};

// How the work is cut. The samples form groups; the grid of (group, list) is walked group by group.
// A list costs its entries plus one, times the group's width, so that equal ranges of positions are
// equal work whatever the pattern.
struct BlockProductWork {
  int64_t units;          // samples, or vectors of samples where `transposed`
  int64_t groups;         // group g has units [g * units / groups, (g + 1) * units / groups)
  int64_t total;          // positions: units * (entries + lists)
  int64_t scratch_size;   // elements that each thread needs
  bool transposed;
  bool stream_output;  // past the caches
};

}  // namespace fastprune
