// What the loss-delta kernels read instead of their arguments, so that every load of a warp is
// whole cache lines: matrices transposed to panels, [column][row], whose rows are padded with
// zeros.
#pragma once

#include <cuda_runtime_api.h>

#include "../types.h"

namespace fastprune {

struct TransposeToPanelArgs {
  MatrixView<const float> source;
  float* panel;         // [source.cols][padded_rows]
  int64_t padded_rows;  // padded_size(source.rows, multiple)
};

struct SoftmaxPanelArgs {
  MatrixView<const float> logits;
  float* probability;   // [classes][padded_size(samples, kWarpSamples)], 0 where padded
  double* log_sum_exp;  // [samples]
};

struct SumSpansArgs {
  const double* partial_sums;  // [spans][num_pieces]
  int64_t spans;
  int64_t num_pieces;
  double* delta_sum;  // [num_pieces]
};

// Each queues its kernel on `stream` and returns at once. cudaErrorInvalidConfiguration: sizes that
// no grid covers.
cudaError_t launch_transpose_to_panel(const MatrixView<const float>& source, float* panel,
                                      int64_t multiple, cudaStream_t stream);
cudaError_t launch_softmax_panel(const SoftmaxPanelArgs& args, cudaStream_t stream);
cudaError_t launch_sum_spans(const SumSpansArgs& args, cudaStream_t stream);

}  // namespace fastprune
