// How the bindings read and make tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <vector>

#include "../kernels/types.h"

// torch 2.11 has this check under another name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace fastprune {

using torch::stable::Tensor;

// The tensor itself where it is contiguous: torch::stable::contiguous looks an op up by its name
// each time, which costs more than a small product.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Asks for huge pages for memory that is about to be written for the first time. From 32 MiB on
// malloc maps fresh pages for every tensor, and faulting them in one by one took as long as a
// product with a tenth of the weights (33 MiB: 14 ms, with huge pages 3.6 ms).
inline void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kWorthwhile = size_t{8} << 20;
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  if (!tensor.is_cpu() || bytes < kWorthwhile) return;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  // Advice only: where the system refuses, the tensor works as before.
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An uninitialised tensor on the device of `like`, without that lookup.
inline Tensor empty_strided_tensor(const Tensor& like, int32_t dtype,
                                   const std::vector<int64_t>& shape,
                                   const std::vector<int64_t>& strides) {
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               dtype, device_type, like.get_device_index(), &handle));
  const Tensor result(handle);
  advise_huge_pages(result);
  return result;
}

// The same with the dtype of `like`.
inline Tensor empty_strided_tensor(const Tensor& like, const std::vector<int64_t>& shape,
                                   const std::vector<int64_t>& strides) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided_tensor(like, dtype, shape, strides);
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * (shape[d] > 0 ? shape[d] : 1);
  }
  return strides;
}

// An uninitialised contiguous tensor with the dtype and the device of `like`.
inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty_strided_tensor(like, shape, contiguous_strides(shape));
}

// The tensor itself where it has the dtype, else a contiguous copy.
inline Tensor as_dtype(const Tensor& tensor, torch::headeronly::ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  const std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  const Tensor result =
      empty_strided_tensor(tensor, static_cast<int32_t>(dtype), shape, contiguous_strides(shape));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(result.get(), tensor.get(), /*non_blocking=*/0));
  return result;
}

// The tensor itself where the columns are contiguous, else a contiguous copy.
inline Tensor with_contiguous_columns(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool usable = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return usable ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
MatrixView<const T> matrix_view(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1),
          tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1)};
}

}  // namespace fastprune
