#include "../kernels/cuda/block_sparse_linear.h"

#include <torch/csrc/stable/library.h>

#include "block_sparse_linear.h"
#include "cuda_stream.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_linear";

// The indices are not read here: that would make the host wait for the device. BlockSparseTensor
// validates them when it is made.
Tensor block_sparse_linear_cuda(const Tensor& input, const Tensor& packed_values,
                                const Tensor& crow_indices, const Tensor& col_indices,
                                const std::optional<Tensor>& bias, int64_t out_features,
                                const std::string& activation_name) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_block_sparse_linear(kOp, input, packed_values, crow_indices, col_indices, bias,
                            out_features);
  if (input.scalar_type() != ScalarType::Float) {
    throw_value_error(kOp, ": on CUDA `input` must have dtype Float, got ",
                      dtype_text(input.scalar_type()));
  }
  if (activation != Activation::kNone && activation != Activation::kRelu) {
    throw_value_error(kOp, ": on CUDA `activation` must be 'none' or 'relu', got '",
                      activation_name, "'");
  }
  const auto guard = device_guard(input);
  const Tensor matrix = as_matrix(input);
  const Tensor values = as_contiguous(packed_values);
  const Tensor crow = as_contiguous(crow_indices);
  const Tensor col = as_contiguous(col_indices);
  std::optional<Tensor> contiguous_bias;
  if (bias) contiguous_bias = as_contiguous(*bias);
  const Tensor output = empty_tensor(input, with_features(input, out_features));

  const auto args =
      kernel_arguments<float>(matrix, values, crow, col, contiguous_bias, activation, output);
  check_launch(launch_block_sparse_linear(args, current_stream(input)), "block_sparse_linear_f32",
               input, "input ", shape_text(input), ", packed_values ", shape_text(packed_values),
               ", output ", shape_text(output));
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("block_sparse_linear", TORCH_BOX(&block_sparse_linear_cuda));
  library.impl("block_sparse_linear_inference", TORCH_BOX(&block_sparse_linear_cuda));
}

}  // namespace fastprune
