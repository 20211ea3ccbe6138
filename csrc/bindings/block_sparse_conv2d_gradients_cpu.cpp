#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../kernels/transposed_structure.h"
#include "block_sparse_conv2d.h"
#include "block_structure.h"
#include "convolve.h"

namespace fastprune {
namespace {

constexpr const char* kInputGradientOp = "block_sparse_conv2d_input_gradient";
constexpr const char* kWeightGradientOp = "block_sparse_conv2d_weight_gradient";

// The taps that reach inputs (i * stride + phase) from outputs i + tap, of one dimension; `which`
// gets their places in the kernel.
std::vector<int64_t> gradient_taps(int64_t phase, int64_t kernel, int64_t stride, int64_t padding,
                                   int64_t dilation, std::vector<int64_t>& which) {
  std::vector<int64_t> taps;
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t distance = phase + padding - k * dilation;
    if (distance % stride != 0) continue;
    taps.push_back(distance / stride);
    which.push_back(k);
  }
  return taps;
}

// With strides, inputs of one phase (their row and column modulo the stride) get gradients from
// some of the taps only: each phase is a convolution of its own, whose output is every stride-th
// input.
template <class T>
void run_input_gradient_phase(const Tensor& grad_output, const Tensor& packed_values,
                              const int32_t* crow, const int32_t* col, int64_t channel_blocks,
                              const ConvolutionGeometry& geometry, int64_t row_phase,
                              int64_t column_phase, ImageView<T> grad_input) {
  std::vector<int64_t> rows_of_kernel, columns_of_kernel;
  const auto row_taps =
      gradient_taps(row_phase, geometry.kernel_height, geometry.stride_height, geometry.padding_top,
                    geometry.dilation_height, rows_of_kernel);
  const auto column_taps =
      gradient_taps(column_phase, geometry.kernel_width, geometry.stride_width,
                    geometry.padding_left, geometry.dilation_width, columns_of_kernel);
  std::vector<ConvolutionTap> taps;
  std::vector<int32_t> ranks(geometry.kernel_height * geometry.kernel_width, -1);
  for (size_t y = 0; y < row_taps.size(); ++y) {
    for (size_t x = 0; x < column_taps.size(); ++x) {
      ranks[rows_of_kernel[y] * geometry.kernel_width + columns_of_kernel[x]] =
          static_cast<int32_t>(taps.size());
      taps.push_back({row_taps[y], column_taps[x]});
    }
  }
  const int64_t rows = packed_values.size(2), cols = packed_values.size(1);
  const int64_t block_rows = ceil_divide(grad_output.size(1), rows);
  const TransposedStructure structure =
      transpose_convolution(crow, col, block_rows, channel_blocks, geometry.groups, ranks);
  grad_input.data += row_phase * grad_input.row_stride + column_phase * grad_input.column_stride;
  grad_input.height = ceil_divide(grad_input.height - row_phase, geometry.stride_height);
  grad_input.width = ceil_divide(grad_input.width - column_phase, geometry.stride_width);
  grad_input.row_stride *= geometry.stride_height;
  grad_input.column_stride *= geometry.stride_width;

  BlockConvolutionArgs<T> args;
  args.input = image_view<const T>(grad_output.const_data_ptr(), grad_output);
  args.weight = {static_cast<const T*>(packed_values.const_data_ptr()),
                 structure.offsets.data(),
                 structure.sources.data(),
                 structure.blocks.data(),
                 geometry.groups * channel_blocks,
                 cols,
                 rows,
                 /*output_stride=*/rows,
                 /*step_stride=*/1};
  args.sources_per_tap = block_rows / geometry.groups;
  args.groups = geometry.groups;
  args.taps = taps.data();
  args.num_taps = static_cast<int64_t>(taps.size());
  args.row_step = args.column_step = 1;
  args.bias = nullptr;
  args.output = grad_input;
  args.activation = Activation::kNone;
  convolve(args);
}

Tensor block_sparse_conv2d_input_gradient_cpu(
    const Tensor& grad_output, const Tensor& packed_values, const Tensor& crow_indices,
    const Tensor& col_indices, const std::vector<int64_t>& input_size,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    bool /*allow_tf32*/) {
  constexpr const char* kOp = kInputGradientOp;
  const ConvolutionGeometry geometry =
      convolution_geometry(kOp, kernel_size, stride, padding, dilation, groups);
  check_dim(kOp, "grad_output", grad_output, 4);
  check_counts(kOp, "input_size", input_size, 4, 0);
  check_weight(kOp, grad_output, packed_values, crow_indices, col_indices);
  const int64_t rows = packed_values.size(2), cols = packed_values.size(1);
  const int64_t channel_blocks =
      check_channels(kOp, geometry, input_size[1], grad_output.size(1), rows, cols);
  check_size(kOp, "crow_indices", crow_indices, 0, ceil_divide(grad_output.size(1), rows) + 1);
  check_grad_output(kOp, grad_output, input_size[0], input_size[2], input_size[3], geometry);
  const Tensor values = as_contiguous(packed_values);
  const Tensor crow_tensor = as_contiguous(crow_indices), col_tensor = as_contiguous(col_indices);
  const auto* crow = static_cast<const int32_t*>(crow_tensor.const_data_ptr());
  const auto* col = static_cast<const int32_t*>(col_tensor.const_data_ptr());
  check_structure(kOp, crow, col, crow_tensor.size(0) - 1,
                  geometry.kernel_height * geometry.kernel_width * channel_blocks, values.size(0));
  const Tensor grad_input =
      empty_images(grad_output, input_size[0], input_size[1], input_size[2], input_size[3]);
  with_floating_type(kOp, "grad_output", grad_output, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t y = 0; y < std::min(geometry.stride_height, input_size[2]); ++y) {
      for (int64_t x = 0; x < std::min(geometry.stride_width, input_size[3]); ++x) {
        run_input_gradient_phase<T>(grad_output, values, crow, col, channel_blocks, geometry, y, x,
                                    image_view<T>(grad_input.mutable_data_ptr(), grad_input));
      }
    }
  });
  return grad_input;
}

template <class T>
void run_weight_gradient(const Tensor& grad_output, const Tensor& input, const Tensor& crow_indices,
                         const Tensor& col_indices, const ConvolutionGeometry& geometry,
                         int64_t channel_blocks, const Tensor& grad_values) {
  const std::vector<ConvolutionTap> taps = forward_taps(geometry);
  BlockSparseConv2dWeightGradientArgs<T> args;
  args.input = image_view<const T>(input.const_data_ptr(), input);
  args.grad_output = image_view<const T>(grad_output.const_data_ptr(), grad_output);
  args.crow_indices = static_cast<const int32_t*>(crow_indices.const_data_ptr());
  args.col_indices = static_cast<const int32_t*>(col_indices.const_data_ptr());
  args.block_rows = crow_indices.size(0) - 1;
  args.rows = grad_values.size(2);
  args.cols = grad_values.size(1);
  args.channel_blocks = channel_blocks;
  args.groups = geometry.groups;
  args.taps = taps.data();
  args.num_taps = static_cast<int64_t>(taps.size());
  args.row_step = geometry.stride_height;
  args.column_step = geometry.stride_width;
  args.grad_values = static_cast<T*>(grad_values.mutable_data_ptr());
  check_structure(kWeightGradientOp, args.crow_indices, args.col_indices, args.block_rows,
                  args.num_taps * channel_blocks, grad_values.size(0));
  if (args.input.images == 0) {
    std::fill_n(args.grad_values, grad_values.numel(), T{});
    return;
  }
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const int64_t multiply_adds = args.grad_output.images * args.grad_output.height *
                                args.grad_output.width * grad_values.numel();
  if (kernels.serves_channels_last_weight_gradient(args)) {
    const ChannelsLastWeightGradientWork work = kernels.plan_channels_last_weight_gradient(args);
    return parallel_kernel<T>(
        work.total, multiply_adds, work.scratch_size, [&](int64_t begin, int64_t end, T* scratch) {
          kernels.channels_last_weight_gradient(args, work, begin, end, scratch);
        });
  }
  const BlockSparseConv2dWeightGradientWork work = kernels.plan_conv2d_weight_gradient(args);
  if (work.total == 0) return;
  const Tensor planes = empty_tensor(input, {args.input.images, work.image_size});
  auto* plane_data = static_cast<T*>(planes.mutable_data_ptr());
  parallel_kernel<T>(args.input.images, args.input.images * work.image_size, 0,
                     [&](int64_t begin, int64_t end, T*) {
                       kernels.copy_conv2d_planes(args, work, begin, end, plane_data);
                     });
  parallel_kernel<T>(work.total, multiply_adds, 0, [&](int64_t begin, int64_t end, T*) {
    kernels.conv2d_weight_gradient(args, work, plane_data, begin, end);
  });
}

// `allow_tf32` is for CUDA: a CPU's float32 has all its bits.
Tensor block_sparse_conv2d_weight_gradient_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& crow_indices,
    const Tensor& col_indices, int64_t rows, int64_t cols, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool /*allow_tf32*/) {
  constexpr const char* kOp = kWeightGradientOp;
  const ConvolutionGeometry geometry =
      convolution_geometry(kOp, kernel_size, stride, padding, dilation, groups);
  const int64_t channel_blocks = check_conv2d_weight_gradient(kOp, grad_output, input, crow_indices,
                                                              col_indices, rows, cols, geometry);
  const Tensor crow = as_contiguous(crow_indices), col = as_contiguous(col_indices);
  const Tensor grad_values = empty_tensor(grad_output, {col.size(0), cols, rows});
  with_floating_type(kOp, "grad_output", grad_output, [&](auto zero) {
    run_weight_gradient<decltype(zero)>(grad_output, input, crow, col, geometry, channel_blocks,
                                        grad_values);
  });
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("block_sparse_conv2d_input_gradient",
               TORCH_BOX(&block_sparse_conv2d_input_gradient_cpu));
  library.impl("block_sparse_conv2d_weight_gradient",
               TORCH_BOX(&block_sparse_conv2d_weight_gradient_cpu));
}

}  // namespace fastprune
