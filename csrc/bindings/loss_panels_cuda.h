// The memory that the loss-delta kernels need on CUDA, from torch's allocator: freed in the order
// of the stream, so that nobody waits for it.
#pragma once

#include <vector>

#include "../kernels/cuda/loss_panels_plan.h"
#include "tensor_memory.h"

namespace fastprune {

// matrix [rows, cols] transposed, its rows padded: [cols, padded rows].
inline Tensor empty_panel(const Tensor& matrix, int64_t multiple) {
  return empty_tensor(matrix, {matrix.size(1), padded_size(matrix.size(0), multiple)});
}

inline Tensor empty_doubles(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, torch::headeronly::ScalarType::Double);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fastprune
