// ablate_linear: the output of a linear layer for each of many masked pieces of its weight
//
// output [samples, out_features]  input @ weight.T, and whatever else the layer added
// input  [samples, in_features]
// weight [out_features, in_features]
// pieces [pieces][4]              row_begin, row_end, col_begin, col_end: a rectangle of the weight
// masked [pieces][samples][out_features], contiguous, aliases none of the others:
//   masked[m, n, r] = output[n, r] - sum_{j in cols} input[n, j] * weight[r, j]  for r in rows
//                     output[n, r]                                               else
// The sum is accumulated in T, in the order of the columns, and subtracted once.
//
// Work: positions of the grid [piece][sample], samples innermost.
#pragma once

#include "types.h"

namespace fastprune {

template <class T>
struct AblateLinearArgs {
  MatrixView<const T> output;
  MatrixView<const T> input;
  MatrixView<const T> weight;
  const int32_t* pieces;
  int64_t num_pieces;
  T* masked;
};

}  // namespace fastprune
