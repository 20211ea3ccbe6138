// What the CUDA bindings of the weight gradients, of linear layers and of convolutions, share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <optional>

#include "../kernels/cuda/block_sparse_linear_weight_gradient.h"
#include "cuda_stream.h"
#include "tensor_memory.h"

namespace fastprune {

inline WeightGradientType weight_gradient_type(const char* op, const Tensor& grad_output) {
  switch (grad_output.scalar_type()) {
    case ScalarType::Float:
      return WeightGradientType::kFloat32;
    case ScalarType::Half:
      return WeightGradientType::kFloat16;
    case ScalarType::BFloat16:
      return WeightGradientType::kBfloat16;
    default:
      throw_value_error(op, ": on CUDA `grad_output` must have dtype Float, Half or BFloat16, got ",
                        dtype_text(grad_output.scalar_type()));
  }
}

// Whether copies of 16 bytes may begin where the tensor does.
inline bool begins_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Room for the sums of the slices, where there are several.
inline std::optional<Tensor> make_partial_sums(const Tensor& grad_values,
                                               const BlockSparseLinearWeightGradientPlan& plan) {
  if (plan.sum.grid[0] == 0) return std::nullopt;
  return torch::stable::new_empty(
      grad_values, {plan.slices, grad_values.size(0), grad_values.size(1), grad_values.size(2)},
      ScalarType::Float);
}

// Sets everything but the operands.
template <class T>
void set_gradient_args(const Tensor& crow_indices, const Tensor& col_indices,
                       const Tensor& grad_values, const std::optional<Tensor>& partial_sums,
                       const BlockSparseLinearWeightGradientPlan& plan,
                       BlockSparseLinearWeightGradientCudaArgs<T>& args) {
  args.gradient.crow_indices = static_cast<const int32_t*>(crow_indices.const_data_ptr());
  args.gradient.col_indices = static_cast<const int32_t*>(col_indices.const_data_ptr());
  args.gradient.block_rows = crow_indices.size(0) - 1;
  args.gradient.rows = grad_values.size(2);
  args.gradient.cols = grad_values.size(1);
  args.gradient.grad_values = static_cast<T*>(grad_values.mutable_data_ptr());
  args.samples_per_slice = plan.samples_per_slice;
  args.slices = plan.slices;
  args.size = grad_values.numel();
  args.partial_sums =
      partial_sums ? static_cast<float*>(partial_sums->mutable_data_ptr()) : nullptr;
}

}  // namespace fastprune
