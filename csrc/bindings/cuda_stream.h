// What every CUDA binding needs beside its kernel: the device, its stream, and errors that say
// which kernel failed, on what.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor_checks.h"

namespace fastprune {

// Makes the tensor's device the current one, for the lifetime of the guard.
inline torch::stable::accelerator::DeviceGuard device_guard(const Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Compute capability as in the list of architectures of the build, "sm_90".
inline std::string architecture_of(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return "of unknown architecture";
  }
  return "sm_" + std::to_string(major) + std::to_string(minor);
}

inline std::string part_text(const Tensor& tensor) { return shape_text(tensor); }
template <class Part>
const Part& part_text(const Part& part) {
  return part;
}

// Errors of earlier kernels surface here too: CUDA reports them to whoever calls next. The parts of
// the message, tensors among them, become text only after a failure: that takes longer than a
// launch.
template <class... Parts>
void check_launch(cudaError_t status, const char* kernel, const Tensor& input,
                  const Parts&... parts) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << "CUDA kernel " << kernel << ": " << cudaGetErrorString(status) << " ("
          << cudaGetErrorName(status) << "), on device " << input.get_device_index() << " ("
          << architecture_of(input.get_device_index()) << "; built for "
          << FASTPRUNE_CUDA_ARCHITECTURES << ") with ";
  (message << ... << part_text(parts));
  throw std::runtime_error(message.str());
}

}  // namespace fastprune
