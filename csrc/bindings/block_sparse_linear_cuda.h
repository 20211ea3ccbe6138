// The ops of block_sparse_linear on CUDA, for convolutions of one pixel, which are such products.
#pragma once

#include "block_sparse_linear.h"

namespace fastprune {

Tensor block_sparse_linear_cuda(const Tensor& input, const Tensor& packed_values,
                                const Tensor& crow_indices, const Tensor& col_indices,
                                const std::optional<Tensor>& bias, int64_t out_features,
                                const std::string& activation_name, bool allow_tf32);

Tensor block_sparse_linear_input_gradient_cuda(const Tensor& grad_output,
                                               const Tensor& packed_values,
                                               const Tensor& crow_indices,
                                               const Tensor& col_indices, int64_t in_features,
                                               bool allow_tf32);

inline void check_cuda_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Half && dtype != ScalarType::BFloat16) {
    throw_value_error(op, ": on CUDA `", name, "` must have dtype Float, Half or BFloat16, got ",
                      dtype_text(dtype));
  }
}

}  // namespace fastprune
