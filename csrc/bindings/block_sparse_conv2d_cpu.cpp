#include <torch/csrc/stable/library.h>

#include "block_sparse_conv2d.h"
#include "block_structure.h"
#include "convolve.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_conv2d";

template <class T>
void run(const Tensor& input, const Tensor& packed_values, const Tensor& crow_indices,
         const Tensor& col_indices, const std::optional<Tensor>& bias,
         const ConvolutionGeometry& geometry, int64_t channel_blocks, Activation activation,
         const Tensor& output) {
  const std::vector<ConvolutionTap> taps = forward_taps(geometry);
  const int64_t rows = packed_values.size(2), cols = packed_values.size(1);
  BlockConvolutionArgs<T> args;
  args.input = image_view<const T>(input.const_data_ptr(), input);
  args.weight = {static_cast<const T*>(packed_values.const_data_ptr()),
                 static_cast<const int32_t*>(crow_indices.const_data_ptr()),
                 static_cast<const int32_t*>(col_indices.const_data_ptr()),
                 /*blocks=*/nullptr,
                 crow_indices.size(0) - 1,
                 rows,
                 cols,
                 /*output_stride=*/1,
                 /*step_stride=*/rows};
  check_structure(kOp, args.weight.offsets, args.weight.sources, args.weight.lists,
                  static_cast<int64_t>(taps.size()) * channel_blocks, packed_values.size(0));
  args.sources_per_tap = channel_blocks;
  args.groups = geometry.groups;
  args.taps = taps.data();
  args.num_taps = static_cast<int64_t>(taps.size());
  args.row_step = geometry.stride_height;
  args.column_step = geometry.stride_width;
  args.bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  args.output = image_view<T>(output.mutable_data_ptr(), output);
  args.activation = activation;
  convolve(args);
}

Tensor compute(const Tensor& input, const Tensor& packed_values, const Tensor& crow_indices,
               const Tensor& col_indices, const std::optional<Tensor>& bias, int64_t out_channels,
               const ConvolutionGeometry& geometry, const std::string& activation_name) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_dim(kOp, "input", input, 4);
  check_weight(kOp, input, packed_values, crow_indices, col_indices);
  const int64_t channel_blocks = check_channels(kOp, geometry, input.size(1), out_channels,
                                                packed_values.size(2), packed_values.size(1));
  check_size(kOp, "crow_indices", crow_indices, 0,
             ceil_divide(out_channels, packed_values.size(2)) + 1);
  if (bias) check_bias(kOp, input, *bias, out_channels);
  const OutputSize size = output_size(kOp, input.size(2), input.size(3), geometry);
  const Tensor values = as_contiguous(packed_values);
  const Tensor crow = as_contiguous(crow_indices);
  const Tensor col = as_contiguous(col_indices);
  std::optional<Tensor> contiguous_bias;
  if (bias) contiguous_bias = as_contiguous(*bias);
  const Tensor output = empty_images(input, input.size(0), out_channels, size.height, size.width);
  with_floating_type(kOp, "input", input, [&](auto zero) {
    run<decltype(zero)>(input, values, crow, col, contiguous_bias, geometry, channel_blocks,
                        activation, output);
  });
  return output;
}

Tensor block_sparse_conv2d_cpu(const Tensor& input, const Tensor& packed_values,
                               const Tensor& crow_indices, const Tensor& col_indices,
                               const std::optional<Tensor>& bias, int64_t out_channels,
                               const std::vector<int64_t>& kernel_size,
                               const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation, int64_t groups,
                               const std::string& activation, bool /*allow_tf32*/) {
  return compute(input, packed_values, crow_indices, col_indices, bias, out_channels,
                 convolution_geometry(kOp, kernel_size, stride, padding, dilation, groups),
                 activation);
}

Tensor block_sparse_conv2d_inference_cpu(const Tensor& input, const Tensor& packed_values,
                                         const Tensor& crow_indices, const Tensor& col_indices,
                                         const std::optional<Tensor>& bias, int64_t out_channels,
                                         const std::vector<int64_t>& geometry,
                                         const std::string& activation, bool /*allow_tf32*/) {
  return compute(input, packed_values, crow_indices, col_indices, bias, out_channels,
                 convolution_geometry(kOp, geometry), activation);
}

}  // namespace

// The same kernel twice: calls that need no gradient skip the Python of the autograd formula.
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("block_sparse_conv2d", TORCH_BOX(&block_sparse_conv2d_cpu));
  library.impl("block_sparse_conv2d_inference", TORCH_BOX(&block_sparse_conv2d_inference_cpu));
}

}  // namespace fastprune
