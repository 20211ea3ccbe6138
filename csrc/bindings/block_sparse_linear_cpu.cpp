#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "../kernels/transposed_structure.h"
#include "block_sparse_linear.h"
#include "block_structure.h"
#include "multiply.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_linear";
constexpr const char* kInputGradientOp = "block_sparse_linear_input_gradient";

template <class T, class W>
void run(const Tensor& input, const Tensor& packed_values, const Tensor& crow_indices,
         const Tensor& col_indices, const std::optional<Tensor>& bias, Activation activation,
         const Tensor& output) {
  const auto args = kernel_arguments<T, W>(input, packed_values, crow_indices, col_indices, bias,
                                           activation, output);
  const auto& weight = args.weight;
  check_structure(kOp, weight.crow_indices, weight.col_indices, weight.block_rows,
                  ceil_divide(args.input.cols, weight.cols), packed_values.size(0));
  std::conditional_t<std::is_same_v<T, W>, BlockProductArgs<T>, MixedBlockProductArgs<T, W>>
      product;
  product.input = args.input;
  product.weight = {weight.packed_values, weight.crow_indices, weight.col_indices,
                    /*blocks=*/nullptr,   weight.block_rows,   weight.rows,
                    weight.cols,          /*output_stride=*/1, /*step_stride=*/weight.rows};
  product.bias = args.bias;
  product.output = args.output;
  product.activation = activation;
  if constexpr (std::is_same_v<T, W>) {
    multiply(product);
  } else {
    multiply_few_samples(product);
  }
}

// `allow_tf32` is for CUDA: a CPU's float32 has all its bits.
Tensor block_sparse_linear_cpu(const Tensor& input, const Tensor& packed_values,
                               const Tensor& crow_indices, const Tensor& col_indices,
                               const std::optional<Tensor>& bias, int64_t out_features,
                               const std::string& activation_name, bool /*allow_tf32*/) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_block_sparse_linear(kOp, input, packed_values, crow_indices, col_indices, bias,
                            out_features);
  const ScalarType computed = computed_dtype(kOp, "input", input);
  const Tensor matrix = as_dtype(as_matrix(input), computed);
  Tensor values = as_contiguous(packed_values);
  const Tensor crow = as_contiguous(crow_indices);
  const Tensor col = as_contiguous(col_indices);
  std::optional<Tensor> contiguous_bias;
  if (bias) contiguous_bias = as_dtype(as_contiguous(*bias), computed);
  const Tensor output = empty_tensor(matrix, with_features(input, out_features));
  if (matrix.size(0) > kMostFewSamples) values = as_dtype(values, computed);
  const auto multiply_by = values.scalar_type() == ScalarType::Double     ? run<double, double>
                           : values.scalar_type() == ScalarType::Float    ? run<float, float>
                           : values.scalar_type() == ScalarType::BFloat16 ? run<float, BFloat16>
                                                                          : run<float, Float16>;
  multiply_by(matrix, values, crow, col, contiguous_bias, activation, output);
  return as_dtype(output, input.scalar_type());
}

// The input gradient is the product with the transposed weight: block columns are its lists.
template <class T>
void run_input_gradient(const Tensor& grad_output, const Tensor& packed_values,
                        const Tensor& crow_indices, const Tensor& col_indices,
                        const Tensor& grad_input) {
  const auto* crow = static_cast<const int32_t*>(crow_indices.const_data_ptr());
  const auto* col = static_cast<const int32_t*>(col_indices.const_data_ptr());
  const int64_t rows = packed_values.size(2), cols = packed_values.size(1);
  const int64_t block_rows = crow_indices.size(0) - 1;
  const int64_t in_features = grad_input.size(grad_input.dim() - 1);
  const int64_t block_cols = ceil_divide(in_features, cols);
  check_structure(kInputGradientOp, crow, col, block_rows, block_cols, packed_values.size(0));
  const TransposedStructure structure = transpose_structure(crow, col, block_rows, block_cols);
  BlockProductArgs<T> product;
  product.input = matrix_view<T>(grad_output);
  product.weight = {static_cast<const T*>(packed_values.const_data_ptr()),
                    structure.offsets.data(),
                    structure.sources.data(),
                    structure.blocks.data(),
                    block_cols,
                    cols,
                    rows,
                    /*output_stride=*/rows,
                    /*step_stride=*/1};
  product.bias = nullptr;
  product.output = {static_cast<T*>(grad_input.mutable_data_ptr()), product.input.rows, in_features,
                    in_features};
  product.activation = Activation::kNone;
  multiply(product);
}

Tensor block_sparse_linear_input_gradient_cpu(const Tensor& grad_output,
                                              const Tensor& packed_values,
                                              const Tensor& crow_indices, const Tensor& col_indices,
                                              int64_t in_features, bool /*allow_tf32*/) {
  check_has_features(kInputGradientOp, "grad_output", grad_output);
  check_weight(kInputGradientOp, grad_output, packed_values, crow_indices, col_indices,
               /*allow_half=*/true);
  check_feature_count(kInputGradientOp, "in_features", in_features);
  check_size(kInputGradientOp, "crow_indices", crow_indices, 0,
             ceil_divide(grad_output.size(grad_output.dim() - 1), packed_values.size(2)) + 1);
  const ScalarType computed = computed_dtype(kInputGradientOp, "grad_output", grad_output);
  const Tensor matrix = as_dtype(as_matrix(grad_output), computed);
  const Tensor values = as_dtype(as_contiguous(packed_values), computed);
  const Tensor crow = as_contiguous(crow_indices);
  const Tensor col = as_contiguous(col_indices);
  const Tensor grad_input = empty_tensor(matrix, with_features(grad_output, in_features));
  with_floating_type(kInputGradientOp, "grad_output", matrix, [&](auto zero) {
    run_input_gradient<decltype(zero)>(matrix, values, crow, col, grad_input);
  });
  return as_dtype(grad_input, grad_output.scalar_type());
}

}  // namespace

// The same kernel twice: calls that need no gradient skip the Python of the autograd formula.
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("block_sparse_linear", TORCH_BOX(&block_sparse_linear_cpu));
  library.impl("block_sparse_linear_inference", TORCH_BOX(&block_sparse_linear_cpu));
  library.impl("block_sparse_linear_input_gradient",
               TORCH_BOX(&block_sparse_linear_input_gradient_cpu));
}

}  // namespace fastprune
