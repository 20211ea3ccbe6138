#pragma once

#include <cuda_runtime_api.h>

#include "../ablate_linear.h"

namespace fastprune {

// Queues the kernel on `stream` and returns at once. cudaErrorInvalidConfiguration: more thread
// blocks than one grid holds.
cudaError_t launch_ablate_linear(const AblateLinearArgs<float>& args, cudaStream_t stream);

}  // namespace fastprune
