#include "../kernels/block_sparse_linear_weight_gradient.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../kernels/cpu/dispatch.h"
#include "block_sparse_linear.h"
#include "block_structure.h"
#include "parallel_kernel.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_linear_weight_gradient";

template <class T>
void run(const Tensor& grad_output, const Tensor& input, const Tensor& crow_indices,
         const Tensor& col_indices, const Tensor& grad_values) {
  BlockSparseLinearWeightGradientArgs<T> args;
  args.input = matrix_view<T>(input);
  args.grad_output = matrix_view<T>(grad_output);
  args.crow_indices = static_cast<const int32_t*>(crow_indices.const_data_ptr());
  args.col_indices = static_cast<const int32_t*>(col_indices.const_data_ptr());
  args.block_rows = crow_indices.size(0) - 1;
  args.rows = grad_values.size(2);
  args.cols = grad_values.size(1);
  args.grad_values = static_cast<T*>(grad_values.mutable_data_ptr());
  check_structure(kOp, args.crow_indices, args.col_indices, args.block_rows,
                  ceil_divide(args.input.cols, args.cols), grad_values.size(0));
  if (args.input.rows == 0) {
    std::fill_n(args.grad_values, grad_values.numel(), T{});
    return;
  }
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const BlockSparseLinearWeightGradientWork work = kernels.plan_weight_gradient(args);
  parallel_kernel<T>(work.total, args.input.rows * grad_values.numel(), work.scratch_size,
                     [&](int64_t begin, int64_t end, T* scratch) {
                       kernels.weight_gradient(args, work, begin, end, scratch);
                     });
}

Tensor block_sparse_linear_weight_gradient_cpu(const Tensor& grad_output, const Tensor& input,
                                               const Tensor& crow_indices,
                                               const Tensor& col_indices, int64_t rows,
                                               int64_t cols, bool /*allow_tf32*/) {
  check_weight_gradient(kOp, grad_output, input, crow_indices, col_indices, rows, cols);
  const ScalarType computed = computed_dtype(kOp, "grad_output", grad_output);
  const Tensor grad_matrix = as_dtype(as_matrix(grad_output), computed);
  const Tensor input_matrix = as_dtype(as_matrix(input), computed);
  const Tensor crow = as_contiguous(crow_indices);
  const Tensor col = as_contiguous(col_indices);
  const Tensor grad_values = empty_tensor(grad_matrix, {col.size(0), cols, rows});
  with_floating_type(kOp, "grad_output", grad_matrix, [&](auto zero) {
    run<decltype(zero)>(grad_matrix, input_matrix, crow, col, grad_values);
  });
  return as_dtype(grad_values, grad_output.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("block_sparse_linear_weight_gradient",
               TORCH_BOX(&block_sparse_linear_weight_gradient_cpu));
}

}  // namespace fastprune
