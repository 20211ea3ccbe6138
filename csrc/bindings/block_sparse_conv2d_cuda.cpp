#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../kernels/cuda/block_sparse_conv2d.h"
#include "block_sparse_conv2d.h"
#include "block_sparse_linear_cuda.h"
#include "channels_last.h"
#include "cuda_stream.h"

// The indices are not read here: that would make the host wait for the device. BlockSparseTensor
// validates them when it is made.
namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_conv2d";
constexpr const char* kInputGradientOp = "block_sparse_conv2d_input_gradient";

const int32_t* indices(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

int32_t* new_indices(const Tensor& tensor) {
  return static_cast<int32_t*>(tensor.mutable_data_ptr());
}

// Images as [images, height, width, channels], and back.
Tensor channels_to_end(const Tensor& images) {
  return torch::stable::transpose(torch::stable::transpose(images, 1, 2), 2, 3);
}

Tensor channels_from_end(const Tensor& images) {
  return torch::stable::transpose(torch::stable::transpose(images, 2, 3), 1, 2);
}

// A kernel of one pixel that reads where it writes is a product of pixels and weights.
bool is_pointwise(const ConvolutionGeometry& geometry) {
  return geometry.kernel_height == 1 && geometry.kernel_width == 1 && geometry.stride_height == 1 &&
         geometry.stride_width == 1 && geometry.padding_top == 0 && geometry.padding_bottom == 0 &&
         geometry.padding_left == 0 && geometry.padding_right == 0 && geometry.groups == 1;
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

LinearArithmetic arithmetic_of(const Tensor& tensor, bool allow_tf32) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return allow_tf32 ? LinearArithmetic::kTf32 : LinearArithmetic::kF32;
    case ScalarType::Half:
      return LinearArithmetic::kF16;
    default:
      return LinearArithmetic::kBf16;
  }
}

ConvolutionShape shape_of(const Tensor& images, int64_t in_channels, int64_t height, int64_t width,
                          int64_t out_channels, const OutputSize& output,
                          const ConvolutionGeometry& geometry, const Tensor& values) {
  int multiprocessors = 0;
  check_launch(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                      images.get_device_index()),
               kOp, images, images);
  return {images.size(0),     in_channels,    height,         width,
          out_channels,       output.height,  output.width,   geometry,
          values.size(2),     values.size(1), values.size(0), is_aligned(values),
          is_aligned(images), multiprocessors};
}

// What the products of one call share.
struct Product {
  const char* op;
  Tensor input, values;  // channels-last, contiguous
  Tensor offsets, sources;
  std::optional<Tensor> blocks, bias;
  Tensor output;
  Activation activation;
};

template <class T>
cudaError_t launch(const Product& product, const ConvolutionPlan& plan) {
  const bool input_gradient = product.blocks.has_value();
  const int64_t rows = product.values.size(2), cols = product.values.size(1);
  ConvolutionProductArgs<T> args;
  static_cast<PatchGeometry&>(args.input) = plan.input;
  args.input.data = static_cast<const T*>(product.input.const_data_ptr());
  args.weight = {static_cast<const T*>(product.values.const_data_ptr()),
                 indices(product.offsets),
                 indices(product.sources),
                 input_gradient ? indices(*product.blocks) : nullptr,
                 plan.lists,
                 input_gradient ? cols : rows,
                 input_gradient ? rows : cols,
                 /*output_stride=*/input_gradient ? rows : 1,
                 /*step_stride=*/input_gradient ? 1 : rows};
  args.bias = product.bias ? static_cast<const T*>(product.bias->const_data_ptr()) : nullptr;
  static_cast<PositionGeometry&>(args.output) = plan.output;
  args.output.data = static_cast<T*>(product.output.mutable_data_ptr());
  args.activation = product.activation;
  return launch_convolution(args, plan, input_gradient, current_stream(product.input));
}

void run(const Product& product, const std::optional<ConvolutionPlan>& plan) {
  cudaError_t status = cudaErrorInvalidConfiguration;
  if (plan) {
    switch (product.input.scalar_type()) {
      case ScalarType::Float:
        status = launch<float>(product, *plan);
        break;
      case ScalarType::Half:
        status = launch<__half>(product, *plan);
        break;
      default:
        status = launch<__nv_bfloat16>(product, *plan);
    }
  }
  check_launch(status, plan ? plan->launch.kernel : product.op, product.input,
               product.blocks ? "grad_output " : "input ", product.input, ", packed_values ",
               product.values, ", output ", product.output);
}

Tensor compute(const Tensor& input, const Tensor& packed_values, const Tensor& crow_indices,
               const Tensor& col_indices, const std::optional<Tensor>& bias, int64_t out_channels,
               const ConvolutionGeometry& geometry, const std::string& activation_name,
               bool allow_tf32) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_dim(kOp, "input", input, 4);
  check_weight(kOp, input, packed_values, crow_indices, col_indices);
  check_cuda_dtype(kOp, "input", input);
  check_channels(kOp, geometry, input.size(1), out_channels, packed_values.size(2),
                 packed_values.size(1));
  check_size(kOp, "crow_indices", crow_indices, 0,
             ceil_divide(out_channels, packed_values.size(2)) + 1);
  if (bias) check_bias(kOp, input, *bias, out_channels);
  const OutputSize size = output_size(kOp, input.size(2), input.size(3), geometry);
  if (is_pointwise(geometry)) {
    return channels_from_end(block_sparse_linear_cuda(channels_to_end(input), packed_values,
                                                      crow_indices, col_indices, bias, out_channels,
                                                      activation_name, allow_tf32));
  }
  const auto guard = device_guard(input);
  std::optional<Tensor> contiguous_bias;
  if (bias) contiguous_bias = as_contiguous(*bias);
  const Product product{
      kOp,
      as_channels_last(input),
      as_contiguous(packed_values),
      as_contiguous(crow_indices),
      as_contiguous(col_indices),
      /*blocks=*/std::nullopt,
      contiguous_bias,
      empty_channels_last(input, input.size(0), out_channels, size.height, size.width),
      activation};
  run(product,
      plan_block_sparse_conv2d(shape_of(product.input, input.size(1), input.size(2), input.size(3),
                                        out_channels, size, geometry, product.values),
                               arithmetic_of(input, allow_tf32)));
  return product.output;
}

Tensor block_sparse_conv2d_cuda(const Tensor& input, const Tensor& packed_values,
                                const Tensor& crow_indices, const Tensor& col_indices,
                                const std::optional<Tensor>& bias, int64_t out_channels,
                                const std::vector<int64_t>& kernel_size,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups,
                                const std::string& activation, bool allow_tf32) {
  return compute(input, packed_values, crow_indices, col_indices, bias, out_channels,
                 convolution_geometry(kOp, kernel_size, stride, padding, dilation, groups),
                 activation, allow_tf32);
}

Tensor block_sparse_conv2d_inference_cuda(const Tensor& input, const Tensor& packed_values,
                                          const Tensor& crow_indices, const Tensor& col_indices,
                                          const std::optional<Tensor>& bias, int64_t out_channels,
                                          const std::vector<int64_t>& geometry,
                                          const std::string& activation, bool allow_tf32) {
  return compute(input, packed_values, crow_indices, col_indices, bias, out_channels,
                 convolution_geometry(kOp, geometry), activation, allow_tf32);
}

// One product for each phase of the input, of the lists that a kernel of some microseconds makes
// anew in each call, since the pattern may have changed.
Tensor block_sparse_conv2d_input_gradient_cuda(
    const Tensor& grad_output, const Tensor& packed_values, const Tensor& crow_indices,
    const Tensor& col_indices, const std::vector<int64_t>& input_size,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    bool allow_tf32) {
  constexpr const char* kOp = kInputGradientOp;
  const ConvolutionGeometry geometry =
      convolution_geometry(kOp, kernel_size, stride, padding, dilation, groups);
  check_dim(kOp, "grad_output", grad_output, 4);
  check_counts(kOp, "input_size", input_size, 4, 0);
  check_weight(kOp, grad_output, packed_values, crow_indices, col_indices);
  check_cuda_dtype(kOp, "grad_output", grad_output);
  const int64_t rows = packed_values.size(2), cols = packed_values.size(1);
  const int64_t channel_blocks =
      check_channels(kOp, geometry, input_size[1], grad_output.size(1), rows, cols);
  check_size(kOp, "crow_indices", crow_indices, 0, ceil_divide(grad_output.size(1), rows) + 1);
  check_grad_output(kOp, grad_output, input_size[0], input_size[2], input_size[3], geometry);
  if (is_pointwise(geometry)) {
    return channels_from_end(block_sparse_linear_input_gradient_cuda(
        channels_to_end(grad_output), packed_values, crow_indices, col_indices, input_size[1],
        allow_tf32));
  }
  const auto guard = device_guard(grad_output);
  const Tensor crow = as_contiguous(crow_indices), col = as_contiguous(col_indices);
  const int64_t lists = groups * channel_blocks;
  const Product product{
      kOp,
      as_channels_last(grad_output),
      as_contiguous(packed_values),
      empty_tensor(crow, {lists * geometry.kernel_height * geometry.kernel_width + 1}),
      empty_tensor(crow, {packed_values.size(0)}),
      empty_tensor(crow, {packed_values.size(0)}),
      /*bias=*/std::nullopt,
      empty_channels_last(grad_output, input_size[0], input_size[1], input_size[2], input_size[3]),
      Activation::kNone};
  const ConvolutionStructureArgs structure{
      indices(crow),
      indices(col),
      new_indices(product.offsets),
      new_indices(product.sources),
      new_indices(*product.blocks),
      tap_classes(geometry.kernel_height, geometry.stride_height, geometry.dilation_height),
      tap_classes(geometry.kernel_width, geometry.stride_width, geometry.dilation_width),
      static_cast<int32_t>((crow.size(0) - 1) / groups),
      static_cast<int32_t>(channel_blocks),
      static_cast<int32_t>(groups)};
  check_launch(launch_convolution_structure(structure, current_stream(grad_output)),
               "block_sparse_conv2d_structure", grad_output, "packed_values ", packed_values,
               ", lists ", lists);
  const ConvolutionShape shape =
      shape_of(product.input, input_size[1], input_size[2], input_size[3], grad_output.size(1),
               {grad_output.size(2), grad_output.size(3)}, geometry, product.values);
  const LinearArithmetic arithmetic = arithmetic_of(grad_output, allow_tf32);
  for (int64_t y = 0; y < std::min(geometry.stride_height, input_size[2]); ++y) {
    for (int64_t x = 0; x < std::min(geometry.stride_width, input_size[3]); ++x) {
      run(product, plan_block_sparse_conv2d_input_gradient(shape, arithmetic, y, x));
    }
  }
  return product.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("block_sparse_conv2d", TORCH_BOX(&block_sparse_conv2d_cuda));
  library.impl("block_sparse_conv2d_inference", TORCH_BOX(&block_sparse_conv2d_inference_cuda));
  library.impl("block_sparse_conv2d_input_gradient",
               TORCH_BOX(&block_sparse_conv2d_input_gradient_cuda));
}

}  // namespace fastprune
