#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/block_sparse_linear_weight_gradient.h"
#include "block_sparse_linear.h"
#include "cuda_stream.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_linear_weight_gradient";

WeightGradientType type_of(const Tensor& grad_output) {
  switch (grad_output.scalar_type()) {
    case ScalarType::Float:
      return WeightGradientType::kFloat32;
    case ScalarType::Half:
      return WeightGradientType::kFloat16;
    case ScalarType::BFloat16:
      return WeightGradientType::kBfloat16;
    default:
      throw_value_error(kOp,
                        ": on CUDA `grad_output` must have dtype Float, Half or BFloat16, got ",
                        dtype_text(grad_output.scalar_type()));
  }
}

bool has_aligned_rows(const Tensor& matrix) {
  constexpr int64_t kCopy = 16;  // bytes
  const auto address = reinterpret_cast<uintptr_t>(matrix.const_data_ptr());
  return address % kCopy == 0 &&
         (matrix.size(0) <= 1 ||
          matrix.stride(0) * static_cast<int64_t>(matrix.element_size()) % kCopy == 0);
}

template <class T>
cudaError_t launch(const Tensor& grad_output, const Tensor& input, const Tensor& crow_indices,
                   const Tensor& col_indices, const Tensor& grad_values,
                   const std::optional<Tensor>& partial_sums,
                   const BlockSparseLinearWeightGradientPlan& plan) {
  BlockSparseLinearWeightGradientCudaArgs<T> args;
  args.gradient.input = matrix_view<T>(input);
  args.gradient.grad_output = matrix_view<T>(grad_output);
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
  return launch_block_sparse_linear_weight_gradient(args, plan, current_stream(grad_output));
}

// The indices are not read here: that would make the host wait for the device. BlockSparseTensor
// validates them when it is made.
Tensor block_sparse_linear_weight_gradient_cuda(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& crow_indices,
                                                const Tensor& col_indices, int64_t rows,
                                                int64_t cols, bool allow_tf32) {
  check_weight_gradient(kOp, grad_output, input, crow_indices, col_indices, rows, cols);
  const WeightGradientType type = type_of(grad_output);
  const auto guard = device_guard(grad_output);
  const Tensor grad_matrix = as_matrix(grad_output), input_matrix = as_matrix(input);
  const Tensor crow = as_contiguous(crow_indices);
  const Tensor col = as_contiguous(col_indices);
  const auto plan = plan_block_sparse_linear_weight_gradient_cuda(
      {input_matrix.size(0), input_matrix.size(1), grad_matrix.size(1), rows, cols, col.size(0)},
      type, allow_tf32, has_aligned_rows(grad_matrix) && has_aligned_rows(input_matrix));
  if (!plan) {
    throw_value_error(kOp, ": no CUDA grid covers `grad_output` ", shape_text(grad_output),
                      " and `input` ", shape_text(input), " with ", col.size(0), " blocks of ",
                      rows, " x ", cols);
  }
  const Tensor grad_values = empty_tensor(grad_output, {col.size(0), cols, rows});
  std::optional<Tensor> partial_sums;
  if (plan->sum.grid[0] > 0) {
    partial_sums = torch::stable::new_empty(grad_output, {plan->slices, col.size(0), cols, rows},
                                            ScalarType::Float);
  }
  const auto run = type == WeightGradientType::kFloat32   ? &launch<float>
                   : type == WeightGradientType::kFloat16 ? &launch<__half>
                                                          : &launch<__nv_bfloat16>;
  check_launch(run(grad_matrix, input_matrix, crow, col, grad_values, partial_sums, *plan),
               plan->product.kernel, grad_output, "grad_output ", shape_text(grad_output),
               ", input ", shape_text(input), ", grad_values ", shape_text(grad_values));
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("block_sparse_linear_weight_gradient",
               TORCH_BOX(&block_sparse_linear_weight_gradient_cuda));
}

}  // namespace fastprune
