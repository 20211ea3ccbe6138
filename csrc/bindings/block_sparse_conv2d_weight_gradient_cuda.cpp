#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/block_sparse_conv2d_weight_gradient.h"
#include "block_sparse_conv2d.h"
#include "channels_last.h"
#include "weight_gradient_cuda.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "block_sparse_conv2d_weight_gradient";

// Of tensors that lie channels-last.
template <class T>
cudaError_t launch(const Tensor& grad_output, const Tensor& input, const Tensor& crow_indices,
                   const Tensor& col_indices, const Tensor& grad_values,
                   const std::optional<Tensor>& partial_sums, int64_t channel_blocks,
                   int64_t groups, const BlockSparseConv2dWeightGradientPlan& plan) {
  const int64_t positions = grad_output.size(0) * grad_output.size(2) * grad_output.size(3);
  const int64_t in_channels = input.size(1), out_channels = grad_output.size(1);
  BlockSparseConv2dWeightGradientCudaArgs<T> args;
  args.gradient.input = {static_cast<const T*>(input.const_data_ptr()), positions,
                         in_channels / groups, in_channels};
  args.gradient.grad_output = {static_cast<const T*>(grad_output.const_data_ptr()), positions,
                               out_channels, out_channels};
  set_gradient_args(crow_indices, col_indices, grad_values, partial_sums, plan.launch, args);
  args.positions = plan.positions;
  args.channel_blocks = static_cast<int32_t>(channel_blocks);
  args.group_outputs = static_cast<int32_t>(out_channels / groups);
  args.pixel_bytes = static_cast<uint32_t>(in_channels * sizeof(T));
  return launch_block_sparse_conv2d_weight_gradient(args, plan, current_stream(grad_output));
}

// The indices are not read here: that would make the host wait for the device. BlockSparseTensor
// validates them when it is made.
Tensor block_sparse_conv2d_weight_gradient_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& crow_indices,
    const Tensor& col_indices, int64_t rows, int64_t cols, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool allow_tf32) {
  const ConvolutionGeometry geometry =
      convolution_geometry(kOp, kernel_size, stride, padding, dilation, groups);
  const int64_t channel_blocks = check_conv2d_weight_gradient(kOp, grad_output, input, crow_indices,
                                                              col_indices, rows, cols, geometry);
  const WeightGradientType type = weight_gradient_type(kOp, grad_output);
  const auto guard = device_guard(grad_output);
  const Tensor grads = as_channels_last(grad_output), inputs = as_channels_last(input);
  const Tensor crow = as_contiguous(crow_indices), col = as_contiguous(col_indices);
  const auto plan = plan_block_sparse_conv2d_weight_gradient_cuda(
      {input.size(0), input.size(1), input.size(2), input.size(3), grad_output.size(1),
       grad_output.size(2), grad_output.size(3), geometry, rows, cols, col.size(0)},
      type, allow_tf32, begins_aligned(grads) && begins_aligned(inputs));
  if (!plan) {
    throw_value_error(kOp, ": no CUDA grid covers `grad_output` ", shape_text(grad_output),
                      " and `input` ", shape_text(input), " with ", col.size(0), " blocks of ",
                      rows, " x ", cols);
  }
  const Tensor grad_values = empty_tensor(grad_output, {col.size(0), cols, rows});
  const std::optional<Tensor> partial_sums = make_partial_sums(grad_values, plan->launch);
  const auto run = type == WeightGradientType::kFloat32   ? &launch<float>
                   : type == WeightGradientType::kFloat16 ? &launch<__half>
                                                          : &launch<__nv_bfloat16>;
  check_launch(
      run(grads, inputs, crow, col, grad_values, partial_sums, channel_blocks, groups, *plan),
      plan->launch.product.kernel, grad_output, "grad_output ", grad_output, ", input ", input,
      ", grad_values ", grad_values);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("block_sparse_conv2d_weight_gradient",
               TORCH_BOX(&block_sparse_conv2d_weight_gradient_cuda));
}

}  // namespace fastprune
