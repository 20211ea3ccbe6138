// The launch geometry of block_sparse_conv2d_weight_gradient.cu: that of the linear layer's, whose
// samples are the output positions.
#pragma once

#include "block_sparse_linear_weight_gradient_plan.h"
#include "convolution_positions.h"

namespace fastprune {

struct BlockSparseConv2dWeightGradientShape {
  int64_t images;
  int64_t in_channels;
  int64_t height;
  int64_t width;
  int64_t out_channels;
  int64_t output_height;
  int64_t output_width;
  ConvolutionGeometry geometry;
  int64_t rows;  // of a block
  int64_t cols;
  int64_t kept;
};

struct BlockSparseConv2dWeightGradientPlan {
  // The linear layer's own kernels, where the inputs are a matrix: a kernel of one pixel that
  // reads where it writes.
  bool pointwise;
  BlockSparseLinearWeightGradientPlan launch;
  ConvolutionPositions positions;
};

namespace weight_gradient_plan {

constexpr WeightGradientNames kConv2d =
    FASTPRUNE_WEIGHT_GRADIENT_NAMES(block_sparse_conv2d_weight_gradient);

// Positions between those that a thread copies: one thread for each chunk of 16 bytes of a tile's
// columns. The plain kernel's threads take all.
constexpr int64_t positions_apart(bool tensor_cores, int64_t itemsize) {
  return tensor_cores ? kGradientThreads / (kGradientTileColumns * itemsize / 16) : 1;
}

}  // namespace weight_gradient_plan

// `aligned`: both tensors, channels-last, begin at a multiple of 16 bytes. Nothing where a size is
// out of range or a grid cannot hold the thread blocks. A grid of 0 thread blocks means an empty
// result, and must not be launched.
inline std::optional<BlockSparseConv2dWeightGradientPlan>
plan_block_sparse_conv2d_weight_gradient_cuda(const BlockSparseConv2dWeightGradientShape& shape,
                                              WeightGradientType type, bool allow_tf32,
                                              bool aligned) {
  using namespace weight_gradient_plan;
  constexpr int64_t kMaxChannels = int64_t{1} << 29;  // strides of pixels take 32 bits
  const ConvolutionGeometry& geometry = shape.geometry;
  if (shape.in_channels < 0 || shape.in_channels > kMaxChannels || shape.out_channels < 0 ||
      shape.out_channels > kMaxChannels || geometry.groups < 1) {
    return std::nullopt;
  }
  const int64_t itemsize = type == WeightGradientType::kFloat32 ? 4 : 2;
  const bool tensor_cores = takes_tensor_cores(shape.rows, shape.cols, type, allow_tf32);
  const auto positions =
      convolution_positions(shape.images, shape.height, shape.width, shape.output_height,
                            shape.output_width, geometry, positions_apart(tensor_cores, itemsize));
  if (!positions) return std::nullopt;
  const bool pointwise =
      geometry.kernel_height == 1 && geometry.kernel_width == 1 && geometry.stride_height == 1 &&
      geometry.stride_width == 1 && geometry.groups == 1 && shape.output_height == shape.height &&
      shape.output_width == shape.width && geometry.padding_top == 0 && geometry.padding_left == 0;
  const int64_t group_channels = shape.in_channels / geometry.groups;
  const int64_t chunk = 16 / itemsize;
  const bool aligned_rows = aligned && shape.in_channels % chunk == 0 &&
                            group_channels % chunk == 0 && shape.out_channels % chunk == 0;
  const auto launch = plan_block_sparse_linear_weight_gradient_cuda(
      {shape.images * shape.output_height * shape.output_width, group_channels, shape.out_channels,
       shape.rows, shape.cols, shape.kept},
      type, allow_tf32, aligned_rows, pointwise ? kLinear : kConv2d);
  if (!launch) return std::nullopt;
  return BlockSparseConv2dWeightGradientPlan{pointwise, *launch, *positions};
}

}  // namespace fastprune
