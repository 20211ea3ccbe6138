// ablated_cross_entropy: the change of the cross-entropy when pieces of the last layer are masked
//
// logits  [samples, classes]   what the last layer gave, its bias included
// hidden  [samples, features]  the inputs of the last layer
// weight  [classes, features]
// targets [samples]            class indices in [0, classes)
// sample_weight [samples]      or null for ones; 0 leaves a sample out
// pieces  [pieces][4]          row_begin, row_end, col_begin, col_end: a rectangle of the weight
// delta_sum[m] = sum_n sample_weight[n] * (CE(logits_m[n], targets[n]) - CE(logits[n],
// targets[n])),
//   logits_m[n, c] = logits[n, c] - sum_{j in cols} hidden[n, j] * weight[c, j] for c in rows
//
// With p = softmax(logits), t = target, d_c = logits_c - logits_m,c:
//   CE(logits_m) - CE(logits) = log(sum_c p_c exp(d_t - d_c)) = log1p(sum_c p_c expm1(d_t - d_c))
// in which nothing cancels: the difference is as accurate for a well-trained network, whose
// deltas are a millionth of the logits, as for any other. Samples for which the sum comes close
// to -1, or exp could overflow, take the plain formula in double. Sums over samples are double,
// over fixed chunks added in order.
#pragma once

#include "cross_entropy_pieces.h"
#include "types.h"

namespace fastprune {

template <class T>
struct AblatedCrossEntropyArgs {
  MatrixView<const T> logits;
  MatrixView<const T> hidden;
  MatrixView<const T> weight;
  const int64_t* targets;
  const T* sample_weight;
  const int32_t* pieces;
  int64_t num_pieces;
  int64_t span;          // samples_per_span()
  double* partial_sums;  // [spans][num_pieces]
};

}  // namespace fastprune
