// ablated_mlp_cross_entropy: the change of the cross-entropy when pieces of the last but one
// layer are masked
//
// logits         [samples, classes]      f(pre_activation) @ second_weight.T + second bias
// input          [samples, in_features]  the inputs of the first layer
// pre_activation [samples, hidden]       input @ first_weight.T + first bias
// first_weight   [hidden, in_features]
// second_weight  [classes, hidden]
// targets        [samples]               class indices in [0, classes)
// sample_weight  [samples]               or null for ones; 0 leaves a sample out
// pieces         [pieces][4]             row_begin, row_end, col_begin, col_end: a rectangle of
//                                        first_weight
// delta_sum[m] = sum_n sample_weight[n] * (CE(logits_m[n], targets[n]) - CE(logits[n],
// targets[n])), with z = pre_activation, and for the rows and cols of piece m
//   u[n, r] = sum_{j in cols} input[n, j] * first_weight[r, j]
//   d[n, c] = sum_{r in rows} second_weight[c, r] * (f(z[n, r]) - f(z[n, r] - u[n, r]))
//   logits_m[n, c] = logits[n, c] - d[n, c]
//
// The loss takes the form of ablated_cross_entropy.h, in which nothing cancels. Nor does it in
// f(z) - f(z - u): cpu/activation_difference.h. Sums over samples are double, over fixed chunks
// added in order.
#pragma once

#include "cross_entropy_pieces.h"
#include "types.h"

namespace fastprune {

template <class T>
struct AblatedMlpCrossEntropyArgs {
  MatrixView<const T> logits;
  MatrixView<const T> input;
  MatrixView<const T> pre_activation;
  MatrixView<const T> first_weight;
  MatrixView<const T> second_weight;
  const int64_t* targets;
  const T* sample_weight;
  const int32_t* pieces;
  int64_t num_pieces;
  Activation activation;
  int64_t span;          // samples_per_span()
  double* partial_sums;  // [spans][num_pieces]
};

}  // namespace fastprune
