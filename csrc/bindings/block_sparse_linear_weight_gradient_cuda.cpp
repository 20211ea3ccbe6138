#include <torch/csrc/stable/library.h>

#include "block_sparse_linear.h"
#include "weight_gradient_cuda.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_linear_weight_gradient";

// Whether each row begins and ends at a multiple of 16 bytes.
bool has_aligned_rows(const Tensor& matrix) {
  const int64_t row_stride = matrix.size(0) > 1 ? matrix.stride(0) : 0;
  return begins_aligned(matrix) &&
         (row_stride | matrix.size(1)) * static_cast<int64_t>(matrix.element_size()) % 16 == 0;
}

template <class T>
cudaError_t launch(const Tensor& grad_output, const Tensor& input, const Tensor& crow_indices,
                   const Tensor& col_indices, const Tensor& grad_values,
                   const std::optional<Tensor>& partial_sums,
                   const BlockSparseLinearWeightGradientPlan& plan) {
  BlockSparseLinearWeightGradientCudaArgs<T> args;
  args.gradient.input = matrix_view<T>(input);
  args.gradient.grad_output = matrix_view<T>(grad_output);
  set_gradient_args(crow_indices, col_indices, grad_values, partial_sums, plan, args);
  return launch_block_sparse_linear_weight_gradient(args, plan, current_stream(grad_output));
}

// The indices are not read here: that would make the host wait for the device. BlockSparseTensor
// validates them when it is made.
Tensor block_sparse_linear_weight_gradient_cuda(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& crow_indices,
                                                const Tensor& col_indices, int64_t rows,
                                                int64_t cols, bool allow_tf32) {
  check_weight_gradient(kOp, grad_output, input, crow_indices, col_indices, rows, cols);
  const WeightGradientType type = weight_gradient_type(kOp, grad_output);
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
  const std::optional<Tensor> partial_sums = make_partial_sums(grad_values, *plan);
  const auto run = type == WeightGradientType::kFloat32   ? &launch<float>
                   : type == WeightGradientType::kFloat16 ? &launch<__half>
                                                          : &launch<__nv_bfloat16>;
  check_launch(run(grad_matrix, input_matrix, crow, col, grad_values, partial_sums, *plan),
               plan->product.kernel, grad_output, "grad_output ", grad_output, ", input ", input,
               ", grad_values ", grad_values);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("block_sparse_linear_weight_gradient",
               TORCH_BOX(&block_sparse_linear_weight_gradient_cuda));
}

}  // namespace fastprune
