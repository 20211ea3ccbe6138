// What the CPU and the CUDA bindings of block_sparse_linear and its gradients share: checks and
// shapes.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../kernels/block_sparse_linear.h"
#include "activation_names.h"
#include "tensor_checks.h"
#include "tensor_memory.h"

namespace fastprune {

constexpr int64_t kLargestBlock = 128;

inline int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Everything of the indices that can be checked without reading them.
inline void check_indices(const char* op, const Tensor& like, const Tensor& crow_indices,
                          const Tensor& col_indices) {
  check_same_device(op, "crow_indices", crow_indices, like);
  check_same_device(op, "col_indices", col_indices, like);
  check_dtype(op, "crow_indices", crow_indices, ScalarType::Int);
  check_dtype(op, "col_indices", col_indices, ScalarType::Int);
  check_dim(op, "crow_indices", crow_indices, 1);
  check_dim(op, "col_indices", col_indices, 1);
}

// Everything of the weight's parts that can be checked without reading the indices; `input` is the
// argument whose device and dtype the others share. allow_half: weights of 16 bits go with float32.
inline void check_weight(const char* op, const Tensor& input, const Tensor& packed_values,
                         const Tensor& crow_indices, const Tensor& col_indices,
                         bool allow_half = false) {
  check_same_device(op, "packed_values", packed_values, input);
  const bool half = allow_half && is_half(packed_values);
  if (!half || input.scalar_type() != ScalarType::Float) {
    check_dtype(op, "packed_values", packed_values, input.scalar_type());
  }
  check_dim(op, "packed_values", packed_values, 3);
  check_indices(op, input, crow_indices, col_indices);
  check_size(op, "col_indices", col_indices, 0, packed_values.size(0));
  const int64_t rows = packed_values.size(2), cols = packed_values.size(1);
  if (rows < 1 || cols < 1 || rows > kLargestBlock || cols > kLargestBlock) {
    throw_value_error(op,
                      ": `packed_values` must be [kept, cols, rows] with cols and rows from 1 to ",
                      kLargestBlock, ", got ", shape_text(packed_values));
  }
}

inline void check_has_features(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.dim() < 1) {
    throw_value_error(op, ": `", name, "` must have at least 1 dimension, got 0");
  }
}

inline void check_feature_count(const char* op, const char* name, int64_t count) {
  if (count < 0) throw_value_error(op, ": `", name, "` must be >= 0, got ", count);
}

inline void check_bias(const char* op, const Tensor& input, const Tensor& bias, int64_t size) {
  check_same_device(op, "bias", bias, input);
  check_dtype(op, "bias", bias, input.scalar_type());
  check_dim(op, "bias", bias, 1);
  check_size(op, "bias", bias, 0, size);
}

inline void check_block_sparse_linear(const char* op, const Tensor& input,
                                      const Tensor& packed_values, const Tensor& crow_indices,
                                      const Tensor& col_indices, const std::optional<Tensor>& bias,
                                      int64_t out_features) {
  check_has_features(op, "input", input);
  check_weight(op, input, packed_values, crow_indices, col_indices, input.is_cpu());
  check_feature_count(op, "out_features", out_features);
  check_size(op, "crow_indices", crow_indices, 0,
             ceil_divide(out_features, packed_values.size(2)) + 1);
  if (bias) check_bias(op, input, *bias, out_features);
}

inline void check_block_sides(const char* op, int64_t rows, int64_t cols) {
  if (rows < 1 || cols < 1 || rows > kLargestBlock || cols > kLargestBlock) {
    throw_value_error(op, ": `rows` and `cols` must be from 1 to ", kLargestBlock, ", got ", rows,
                      " and ", cols);
  }
}

inline void check_weight_gradient(const char* op, const Tensor& grad_output, const Tensor& input,
                                  const Tensor& crow_indices, const Tensor& col_indices,
                                  int64_t rows, int64_t cols) {
  check_has_features(op, "grad_output", grad_output);
  check_has_features(op, "input", input);
  check_same_device(op, "input", input, grad_output);
  check_dtype(op, "input", input, grad_output.scalar_type());
  check_indices(op, grad_output, crow_indices, col_indices);
  check_dim(op, "input", input, grad_output.dim());
  for (int64_t d = 0; d + 1 < input.dim(); ++d) {
    check_size(op, "input", input, d, grad_output.size(d));
  }
  check_block_sides(op, rows, cols);
  check_size(op, "crow_indices", crow_indices, 0,
             ceil_divide(grad_output.size(grad_output.dim() - 1), rows) + 1);
}

// The shape of `input` with another number of features.
inline std::vector<int64_t> with_features(const Tensor& input, int64_t features) {
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = features;
  return shape;
}

// The input as a matrix [samples, in_features]: the tensor itself where its rows can be walked
// with one stride, else a copy.
inline Tensor as_matrix(const Tensor& input) {
  const int64_t features = input.size(input.dim() - 1);
  if (input.dim() == 2) return with_contiguous_columns(input);
  int64_t samples = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) samples *= input.size(d);
  return with_contiguous_columns(torch::stable::reshape(input, {samples, features}));
}

// The kernel's arguments, from tensors that are checked and contiguous, and that outlive the call.
template <class T, class W = T>
BlockSparseLinearArgs<T, W> kernel_arguments(const Tensor& matrix, const Tensor& packed_values,
                                             const Tensor& crow_indices, const Tensor& col_indices,
                                             const std::optional<Tensor>& bias,
                                             Activation activation, const Tensor& output) {
  const int64_t out_features = output.size(output.dim() - 1);
  BlockSparseLinearArgs<T, W> args;
  args.input = matrix_view<T>(matrix);
  args.weight.packed_values = static_cast<const W*>(packed_values.const_data_ptr());
  args.weight.crow_indices = static_cast<const int32_t*>(crow_indices.const_data_ptr());
  args.weight.col_indices = static_cast<const int32_t*>(col_indices.const_data_ptr());
  args.weight.block_rows = crow_indices.size(0) - 1;
  args.weight.rows = packed_values.size(2);
  args.weight.cols = packed_values.size(1);
  args.bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  args.output = {static_cast<T*>(output.mutable_data_ptr()), args.input.rows, out_features,
                 out_features};
  args.activation = activation;
  return args;
}

}  // namespace fastprune
