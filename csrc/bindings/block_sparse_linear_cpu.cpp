#include <torch/csrc/stable/library.h>

#include <vector>

#include "../kernels/cpu/dispatch.h"
#include "block_sparse_linear.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_linear";

// The indices may come from a file: nothing is read through them before this. It costs about a
// nanosecond for each kept block.
void check_structure(const int32_t* crow, const int32_t* col, int64_t block_rows,
                     int64_t block_cols, int64_t kept) {
  if (crow[0] != 0 || crow[block_rows] != kept) {
    throw_value_error(kOp, ": `crow_indices` must begin with 0 and end with ", kept,
                      ", the number of blocks, got ", crow[0], " and ", crow[block_rows]);
  }
  for (int64_t row = 0; row < block_rows; ++row) {
    if (crow[row] > crow[row + 1] || crow[row + 1] > kept) {
      throw_value_error(kOp, ": `crow_indices` must not decrease, got ", crow[row], " then ",
                        crow[row + 1], " at block row ", row);
    }
    int64_t previous = -1;
    for (int64_t k = crow[row]; k < crow[row + 1]; ++k) {
      if (col[k] <= previous || col[k] >= block_cols) {
        throw_value_error(kOp, ": `col_indices` must increase within a block row and lie in [0, ",
                          block_cols, "), got ", col[k], " after ", previous, " in block row ",
                          row);
      }
      previous = col[k];
    }
  }
}

template <class T>
void run(const Tensor& input, const Tensor& packed_values, const Tensor& crow_indices,
         const Tensor& col_indices, const std::optional<Tensor>& bias, Activation activation,
         const Tensor& output) {
  const auto args = kernel_arguments<T>(input, packed_values, crow_indices, col_indices, bias,
                                        activation, output);

  const int64_t block_cols = (args.input.cols + args.weight.cols - 1) / args.weight.cols;
  check_structure(args.weight.crow_indices, args.weight.col_indices, args.weight.block_rows,
                  block_cols, packed_values.size(0));
  if (args.input.rows == 0 || args.output.cols == 0) return;

  const BlockSparseLinearWork work = plan_block_sparse_linear(args);
  const auto kernel = kernels_of<T>(cpu_kernels()).block_sparse_linear;
  // Waking another thread costs some microseconds, about this many multiply-adds.
  constexpr int64_t kWorthAThread = 200'000;
  const int64_t per_position = work.samples_per_tile * args.weight.rows * args.weight.cols;
  torch::stable::parallel_for(0, work.total, kWorthAThread / per_position + 1,
                              [&](int64_t begin, int64_t end) {
                                // Kept between calls: fresh pages cost more than the copy.
                                thread_local std::vector<T> scratch;
                                if (scratch.size() < static_cast<size_t>(work.scratch_size)) {
                                  scratch.resize(work.scratch_size);
                                }
                                kernel(args, begin, end, scratch.data());
                              });
}

Tensor block_sparse_linear_cpu(const Tensor& input, const Tensor& packed_values,
                               const Tensor& crow_indices, const Tensor& col_indices,
                               const std::optional<Tensor>& bias, int64_t out_features,
                               const std::string& activation_name) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_block_sparse_linear(kOp, input, packed_values, crow_indices, col_indices, bias,
                            out_features);
  const Tensor matrix = as_matrix(input);
  const Tensor values = torch::stable::contiguous(packed_values);
  const Tensor crow = torch::stable::contiguous(crow_indices);
  const Tensor col = torch::stable::contiguous(col_indices);
  std::optional<Tensor> contiguous_bias;
  if (bias) contiguous_bias = torch::stable::contiguous(*bias);
  const Tensor output = torch::stable::new_empty(input, output_shape(input, out_features));
  switch (input.scalar_type()) {
    case ScalarType::Float:
      run<float>(matrix, values, crow, col, contiguous_bias, activation, output);
      break;
    case ScalarType::Double:
      run<double>(matrix, values, crow, col, contiguous_bias, activation, output);
      break;
    default:
      throw_value_error(kOp, ": `input` must have dtype Float or Double, got ",
                        dtype_text(input.scalar_type()));
  }
  return output;
}

}  // namespace

// The same kernel twice: calls that need no gradient skip the Python of the autograd formula.
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("block_sparse_linear", TORCH_BOX(&block_sparse_linear_cpu));
  library.impl("block_sparse_linear_inference", TORCH_BOX(&block_sparse_linear_cpu));
}

}  // namespace fastprune
