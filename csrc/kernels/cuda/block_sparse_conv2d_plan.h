// Which kernel serves block_sparse_conv2d or its input gradient, with what geometry.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <optional>

#include "block_sparse_conv2d_geometry.h"
#include "block_sparse_linear_plan.h"

namespace fastprune {

struct ConvolutionShape {
  int64_t images, in_channels, height, width;
  int64_t out_channels, output_height, output_width;
  ConvolutionGeometry geometry;
  int64_t rows, cols;                   // of a block
  int64_t kept;                         // blocks
  bool aligned_weights, aligned_input;  // they begin at multiples of 16 bytes
  int64_t multiprocessors;              // of the device
};

// One product. Its input and output are described without their pointers.
struct ConvolutionPlan {
  LaunchPlan launch;
  LinearTile tile;
  int64_t lists;
  PatchGeometry input;
  PositionGeometry output;
};

#define FASTPRUNE_CONVOLUTION_NAMES(prefix)                                     \
  {prefix "_64x64_by_16", prefix "_64x64_by_16_narrow", prefix "_256x64_by_16", \
   prefix "_256x64_by_32", prefix "_256x64_by_64"}

// By arithmetic (from kTf32 on), direction and tile (from k64x64By16 on).
constexpr const char* kConvolutionKernels[3][2][5] = {
    {FASTPRUNE_CONVOLUTION_NAMES("block_sparse_conv2d_tf32"),
     FASTPRUNE_CONVOLUTION_NAMES("block_sparse_conv2d_input_gradient_tf32")},
    {FASTPRUNE_CONVOLUTION_NAMES("block_sparse_conv2d_f16"),
     FASTPRUNE_CONVOLUTION_NAMES("block_sparse_conv2d_input_gradient_f16")},
    {FASTPRUNE_CONVOLUTION_NAMES("block_sparse_conv2d_bf16"),
     FASTPRUNE_CONVOLUTION_NAMES("block_sparse_conv2d_input_gradient_bf16")}};
#undef FASTPRUNE_CONVOLUTION_NAMES

constexpr const char* kAnyConvolutionKernels[] = {
    "block_sparse_conv2d_f32", "block_sparse_conv2d_f32", "block_sparse_conv2d_f16",
    "block_sparse_conv2d_bf16"};

constexpr int64_t kLargestIndex = 2147483646;  // of what the kernels count in 32 bits

// Whether the distance of any tap, in elements, fits 32 bits.
inline bool taps_fit(const PatchGeometry& input) {
  const auto reach = [](int64_t first, int64_t spacing, int64_t taps) {
    return std::max(std::abs(first), std::abs(first + spacing * std::max<int64_t>(taps - 1, 0)));
  };
  const int64_t across = input.taps_across.divisor;
  const int64_t rows = reach(input.first_row, input.row_spacing, input.taps.divisor / across);
  const int64_t columns = reach(input.first_column, input.column_spacing, across);
  // Both are below 2^31.
  return rows * input.width + columns < kLargestIndex / std::max(input.channels, 1) - 1;
}

// Whether all that the kernels count in 32 bits can be.
inline bool convolution_fits(const ConvolutionShape& shape, int64_t position_rows,
                             int64_t position_columns) {
  const ConvolutionGeometry& geometry = shape.geometry;
  const auto product_fits = [](std::initializer_list<int64_t> factors) {
    int64_t product = 1;
    for (const int64_t factor : factors) {
      if (factor < 0 || (product > 0 && factor > kLargestIndex / product)) return false;
      product *= factor;
    }
    return true;
  };
  const int64_t taps[] = {geometry.kernel_height, geometry.kernel_width};
  const int64_t channel_blocks = tiles_of(shape.in_channels / geometry.groups, shape.cols);
  const int64_t row_blocks = tiles_of(shape.out_channels / geometry.groups, shape.rows);
  return shape.kept >= 0 && product_fits({shape.in_channels}) &&
         product_fits({shape.out_channels}) && product_fits({taps[0], taps[1]}) &&
         product_fits({geometry.groups, taps[0], taps[1], channel_blocks}) &&
         product_fits({geometry.groups, taps[0], taps[1], row_blocks}) &&
         product_fits({geometry.groups, channel_blocks, shape.cols}) &&
         product_fits({shape.images, position_rows, position_columns});
}

// Chooses the kernel of a product whose geometry stands.
inline std::optional<ConvolutionPlan> plan_convolution(ConvolutionPlan plan,
                                                       const ConvolutionShape& shape,
                                                       LinearArithmetic arithmetic,
                                                       bool input_gradient) {
  const PatchGeometry& input = plan.input;
  const int64_t outputs = plan.output.cols;
  const int64_t item_size =
      arithmetic == LinearArithmetic::kF32 || arithmetic == LinearArithmetic::kTf32 ? 4 : 2;
  const BlockProductShape product{input.rows,
                                  input.cols,
                                  outputs,
                                  input_gradient ? shape.rows : shape.cols,
                                  input_gradient ? shape.cols : shape.rows,
                                  shape.kept,
                                  input_gradient,
                                  shape.aligned_weights,
                                  shape.aligned_input && input.cols * item_size % 16 == 0,
                                  shape.multiprocessors};
  if (arithmetic == LinearArithmetic::kF32 || !tensor_cores_serve(product) || !taps_fit(input)) {
    const auto any = plan_any_block_product(product, arithmetic);
    if (!any) return std::nullopt;
    plan.tile = any->tile;
    plan.launch = any->launch;
    plan.launch.kernel = kAnyConvolutionKernels[static_cast<int>(arithmetic)];
    return plan;
  }
  plan.tile = tile_of_many(product);
  const int place = static_cast<int>(plan.tile) - static_cast<int>(LinearTile::k64x64By16);
  const char* kernel = kConvolutionKernels[static_cast<int>(arithmetic) - 1][input_gradient][place];
  const auto launch = tile_launch(plan.tile, kernel, input.rows, outputs);
  if (!launch) return std::nullopt;
  plan.launch = *launch;
  return plan;
}

// Nothing where 32 bits do not hold all positions or the structure, or a grid the thread blocks. A
// grid of 0 thread blocks means an empty output, and must not be launched.
inline std::optional<ConvolutionPlan> plan_block_sparse_conv2d(const ConvolutionShape& shape,
                                                               LinearArithmetic arithmetic) {
  const ConvolutionGeometry& geometry = shape.geometry;
  if (!convolution_fits(shape, shape.output_height, shape.output_width)) return std::nullopt;
  const int64_t channels = shape.in_channels / geometry.groups;
  const int64_t group_channels = shape.out_channels / geometry.groups;
  const int64_t lists_per_group = tiles_of(group_channels, shape.rows);
  ConvolutionPlan plan{};
  plan.lists = geometry.groups * lists_per_group;
  PatchGeometry& input = plan.input;
  input.rows = shape.images * shape.output_height * shape.output_width;
  input.cols = channels;
  input.image_size = shape.height * shape.width * shape.in_channels;
  input.height = static_cast<int32_t>(shape.height);
  input.width = static_cast<int32_t>(shape.width);
  input.channels = static_cast<int32_t>(shape.in_channels);
  input.row_step = static_cast<int32_t>(geometry.stride_height);
  input.column_step = static_cast<int32_t>(geometry.stride_width);
  input.first_row = -static_cast<int32_t>(geometry.padding_top);
  input.row_spacing = static_cast<int32_t>(geometry.dilation_height);
  input.first_column = -static_cast<int32_t>(geometry.padding_left);
  input.column_spacing = static_cast<int32_t>(geometry.dilation_width);
  input.taps_across = divisor_of(geometry.kernel_width);
  input.taps = divisor_of(geometry.kernel_height * geometry.kernel_width);
  input.sources_per_tap = divisor_of(tiles_of(channels, shape.cols));
  input.output_width = divisor_of(shape.output_width);
  input.output_height = divisor_of(shape.output_height);
  input.lists_per_group = static_cast<int32_t>(lists_per_group);
  input.list_stride = 1;
  input.list_begin = 0;
  input.list_end = 1;
  PositionGeometry& output = plan.output;
  output.cols = shape.out_channels;
  output.column_stride = shape.out_channels;
  output.row_stride = shape.output_width * output.column_stride;
  output.image_stride = shape.output_height * output.row_stride;
  output.group_cols = divisor_of(lists_per_group * shape.rows);
  output.group_channels = static_cast<int32_t>(group_channels);
  return plan_convolution(plan, shape, arithmetic, /*input_gradient=*/false);
}

// The product of one phase of the input, below the strides and within the image. The lists are
// those of ConvolutionStructureArgs.
inline std::optional<ConvolutionPlan> plan_block_sparse_conv2d_input_gradient(
    const ConvolutionShape& shape, LinearArithmetic arithmetic, int64_t row_phase,
    int64_t column_phase) {
  const ConvolutionGeometry& geometry = shape.geometry;
  const int64_t height = tiles_of(shape.height - row_phase, geometry.stride_height);
  const int64_t width = tiles_of(shape.width - column_phase, geometry.stride_width);
  if (!convolution_fits(shape, height, width)) return std::nullopt;
  const int64_t channels = shape.out_channels / geometry.groups;
  const int64_t group_channels = shape.in_channels / geometry.groups;
  const int64_t lists_per_group = tiles_of(group_channels, shape.cols);
  const PhaseTaps rows = phase_taps(row_phase, geometry.kernel_height, geometry.stride_height,
                                    geometry.padding_top, geometry.dilation_height);
  const PhaseTaps columns = phase_taps(column_phase, geometry.kernel_width, geometry.stride_width,
                                       geometry.padding_left, geometry.dilation_width);
  ConvolutionPlan plan{};
  plan.lists = geometry.groups * lists_per_group;
  PatchGeometry& input = plan.input;
  input.rows = shape.images * height * width;
  input.cols = channels;
  input.image_size = shape.output_height * shape.output_width * shape.out_channels;
  input.height = static_cast<int32_t>(shape.output_height);
  input.width = static_cast<int32_t>(shape.output_width);
  input.channels = static_cast<int32_t>(shape.out_channels);
  input.row_step = input.column_step = 1;
  input.first_row = static_cast<int32_t>(rows.first);
  input.row_spacing = static_cast<int32_t>(rows.spacing);
  input.first_column = static_cast<int32_t>(columns.first);
  input.column_spacing = static_cast<int32_t>(columns.spacing);
  input.taps_across = divisor_of(columns.count);
  input.taps = divisor_of(int64_t{rows.count} * columns.count);
  input.sources_per_tap = divisor_of(tiles_of(channels, shape.rows));
  input.output_width = divisor_of(width);
  input.output_height = divisor_of(height);
  input.lists_per_group = static_cast<int32_t>(lists_per_group);
  const TapClasses row_classes =
      tap_classes(geometry.kernel_height, geometry.stride_height, geometry.dilation_height);
  const TapClasses column_classes =
      tap_classes(geometry.kernel_width, geometry.stride_width, geometry.dilation_width);
  input.list_stride = static_cast<int32_t>(geometry.kernel_height * geometry.kernel_width);
  input.list_begin = row_classes.before(rows.tap_class) * column_classes.taps +
                     rows.count * column_classes.before(columns.tap_class);
  input.list_end = input.list_begin + rows.count * columns.count;
  PositionGeometry& output = plan.output;
  const int64_t group_cols = lists_per_group * shape.cols;
  output.cols = group_channels > 0 ? (geometry.groups - 1) * group_cols + group_channels : 0;
  output.column_stride = geometry.stride_width * shape.in_channels;
  output.row_stride = geometry.stride_height * shape.width * shape.in_channels;
  output.image_stride = shape.height * shape.width * shape.in_channels;
  output.first = (row_phase * shape.width + column_phase) * shape.in_channels;
  output.group_cols = divisor_of(group_cols);
  output.group_channels = static_cast<int32_t>(group_channels);
  return plan_convolution(plan, shape, arithmetic, /*input_gradient=*/true);
}

}  // namespace fastprune
