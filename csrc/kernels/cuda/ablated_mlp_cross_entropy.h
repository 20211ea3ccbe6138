#pragma once

#include <cuda_runtime_api.h>

#include "../ablated_mlp_cross_entropy.h"

namespace fastprune {

struct AblatedMlpCrossEntropyCudaArgs {
  AblatedMlpCrossEntropyArgs<float> call;  // span and partial_sums: of the plan
  // Scratch memory, filled by the kernels of loss_panels.h; samples are padded_size(samples,
  // kWarpSamples), other rows padded_size(rows, kQuad).
  float* probability;           // [classes][samples]
  double* log_sum_exp;          // [samples], not padded
  float* input_panel;           // [in_features][samples]
  float* pre_activation_panel;  // [hidden][samples]
  float* first_weight_panel;    // [in_features][hidden]
  float* second_weight_panel;   // [hidden][classes]
  double* delta_sum;            // [num_pieces]
};

// Queues all kernels on `stream` and returns at once. cudaErrorInvalidConfiguration: sizes that no
// grid covers.
cudaError_t launch_ablated_mlp_cross_entropy(const AblatedMlpCrossEntropyCudaArgs& args,
                                             cudaStream_t stream);

}  // namespace fastprune
