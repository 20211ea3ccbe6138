#include "../kernels/cuda/block_sparse_linear.h"

#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/transposed_structure.h"
#include "block_sparse_linear_cuda.h"
#include "cuda_stream.h"

// The indices are not read here: that would make the host wait for the device. BlockSparseTensor
// validates them when it is made.
namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_linear";
constexpr const char* kInputGradientOp = "block_sparse_linear_input_gradient";

// What the two products differ in.
struct Product {
  const char* op;
  const Tensor& input;
  const Tensor& packed_values;
  Tensor offsets, sources;
  std::optional<Tensor> blocks, bias;
  int64_t output_features;
  Activation activation;
  bool input_gradient;
  bool allow_tf32;
};

template <class T>
cudaError_t launch(const BlockProductArgs<T>& args, const Product& product, cudaStream_t stream,
                   const char** kernel) {
  const int64_t kept = product.packed_values.size(0);
  if constexpr (std::is_same_v<T, float>) {
    return launch_block_product(args, kept, product.allow_tf32, product.input_gradient, stream,
                                kernel);
  } else {
    return launch_block_product(args, kept, product.input_gradient, stream, kernel);
  }
}

template <class T>
void run(const Product& product, const Tensor& matrix, const Tensor& values, const Tensor& output) {
  const auto indices = [](const Tensor& tensor) {
    return static_cast<const int32_t*>(tensor.const_data_ptr());
  };
  const int64_t rows = values.size(2), cols = values.size(1);
  BlockProductArgs<T> args;
  args.input = matrix_view<T>(matrix);
  args.weight.values = static_cast<const T*>(values.const_data_ptr());
  args.weight.offsets = indices(product.offsets);
  args.weight.sources = indices(product.sources);
  args.weight.blocks = product.blocks ? indices(*product.blocks) : nullptr;
  args.weight.lists = product.offsets.size(0) - 1;
  args.weight.outputs = product.input_gradient ? cols : rows;
  args.weight.steps = product.input_gradient ? rows : cols;
  args.weight.output_stride = product.input_gradient ? rows : 1;
  args.weight.step_stride = product.input_gradient ? 1 : rows;
  args.bias = product.bias ? static_cast<const T*>(product.bias->const_data_ptr()) : nullptr;
  args.output = {static_cast<T*>(output.mutable_data_ptr()), args.input.rows,
                 product.output_features, product.output_features};
  args.activation = product.activation;
  const char* kernel = product.op;
  const cudaError_t status = launch(args, product, current_stream(product.input), &kernel);
  check_launch(status, kernel, product.input, product.input_gradient ? "grad_output " : "input ",
               product.input, ", packed_values ", product.packed_values, ", output ", output);
}

Tensor run(const Product& product) {
  const Tensor matrix = as_matrix(product.input);
  const Tensor values = as_contiguous(product.packed_values);
  const Tensor output =
      empty_tensor(product.input, with_features(product.input, product.output_features));
  switch (product.input.scalar_type()) {
    case ScalarType::Float:
      run<float>(product, matrix, values, output);
      break;
    case ScalarType::Half:
      run<__half>(product, matrix, values, output);
      break;
    default:
      run<__nv_bfloat16>(product, matrix, values, output);
  }
  return output;
}

}  // namespace

Tensor block_sparse_linear_cuda(const Tensor& input, const Tensor& packed_values,
                                const Tensor& crow_indices, const Tensor& col_indices,
                                const std::optional<Tensor>& bias, int64_t out_features,
                                const std::string& activation_name, bool allow_tf32) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_block_sparse_linear(kOp, input, packed_values, crow_indices, col_indices, bias,
                            out_features);
  check_cuda_dtype(kOp, "input", input);
  const auto guard = device_guard(input);
  std::optional<Tensor> contiguous_bias;
  if (bias) contiguous_bias = as_contiguous(*bias);
  return run({kOp, input, packed_values, as_contiguous(crow_indices), as_contiguous(col_indices),
              /*blocks=*/std::nullopt, contiguous_bias, out_features, activation,
              /*input_gradient=*/false, allow_tf32});
}

// The product with the transposed weight: block columns are its lists, found anew in each call by a
// kernel of a few microseconds, since the pattern may have changed.
Tensor block_sparse_linear_input_gradient_cuda(const Tensor& grad_output,
                                               const Tensor& packed_values,
                                               const Tensor& crow_indices,
                                               const Tensor& col_indices, int64_t in_features,
                                               bool allow_tf32) {
  check_has_features(kInputGradientOp, "grad_output", grad_output);
  check_weight(kInputGradientOp, grad_output, packed_values, crow_indices, col_indices);
  check_feature_count(kInputGradientOp, "in_features", in_features);
  check_size(kInputGradientOp, "crow_indices", crow_indices, 0,
             ceil_divide(grad_output.size(grad_output.dim() - 1), packed_values.size(2)) + 1);
  check_cuda_dtype(kInputGradientOp, "grad_output", grad_output);
  const auto guard = device_guard(grad_output);
  const Tensor crow = as_contiguous(crow_indices), col = as_contiguous(col_indices);
  const int64_t block_cols = ceil_divide(in_features, packed_values.size(1));
  const int64_t kept = packed_values.size(0);
  const Tensor offsets = empty_tensor(crow, {block_cols + 1});
  const Tensor sources = empty_tensor(crow, {kept}), blocks = empty_tensor(crow, {kept});
  const auto as_indices = [](const Tensor& tensor) {
    return static_cast<int32_t*>(tensor.mutable_data_ptr());
  };
  const TransposedStructureArgs structure{static_cast<const int32_t*>(crow.const_data_ptr()),
                                          static_cast<const int32_t*>(col.const_data_ptr()),
                                          crow.size(0) - 1,
                                          as_indices(offsets),
                                          as_indices(sources),
                                          as_indices(blocks)};
  check_launch(launch_transposed_structure(structure, block_cols, current_stream(grad_output)),
               "transposed_structure", grad_output, "packed_values ", packed_values,
               ", block columns ", block_cols);
  return run({kInputGradientOp, grad_output, packed_values, offsets, sources, blocks,
              /*bias=*/std::nullopt, in_features, Activation::kNone, /*input_gradient=*/true,
              allow_tf32});
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("block_sparse_linear", TORCH_BOX(&block_sparse_linear_cuda));
  library.impl("block_sparse_linear_inference", TORCH_BOX(&block_sparse_linear_cuda));
  library.impl("block_sparse_linear_input_gradient",
               TORCH_BOX(&block_sparse_linear_input_gradient_cuda));
}

}  // namespace fastprune
