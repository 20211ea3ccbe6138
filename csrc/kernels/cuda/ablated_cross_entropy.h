#pragma once

#include <cuda_runtime_api.h>

#include "../ablated_cross_entropy.h"

namespace fastprune {

struct AblatedCrossEntropyCudaArgs {
  AblatedCrossEntropyArgs<float> call;  // span and partial_sums: of the plan
  // Scratch memory, filled by the kernels of loss_panels.h.
  float* probability;   // [classes][padded_size(samples, kWarpSamples)]
  double* log_sum_exp;  // [samples]
  float* hidden_panel;  // [features][padded_size(samples, kWarpSamples)]
  float* weight_panel;  // [features][padded_size(classes, kQuad)]
  double* delta_sum;    // [num_pieces]
};

// Queues all kernels on `stream` and returns at once. cudaErrorInvalidConfiguration: sizes that no
// grid covers.
cudaError_t launch_ablated_cross_entropy(const AblatedCrossEntropyCudaArgs& args,
                                         cudaStream_t stream);

}  // namespace fastprune
