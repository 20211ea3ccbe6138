// block_sparse_conv2d: output[n, o, i, j] = activation(bias[o] + sum over taps (y, x), channels c:
//   input[n, c, i * stride_height + y * dilation_height - padding_top,
//               j * stride_width + x * dilation_width - padding_left] * weight[o, (y, x), c])
//
// input  [images, in_channels, height, width], any strides; zero outside
// weight block-sparse [out_channels, taps * channel_blocks * cols], channels innermost, taps
//        row-major, channel_blocks = ceil(in_channels / groups / cols): padding is per tap
// bias   [out_channels] or null
// output [images, out_channels, output_height, output_width], must not alias an argument
//
// Output channels [g * out_channels / groups, (g + 1) * out_channels / groups) read input channels
// [g * in_channels / groups, (g + 1) * in_channels / groups). Rows of a block lie in one group.
//
// Sums accumulate in T, in the order of the kept blocks of a block row, so the bits depend neither
// on the number of threads nor on the other images.
#pragma once

#include "types.h"

namespace fastprune {

struct ConvolutionGeometry {
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_top, padding_bottom, padding_left, padding_right;
  int64_t dilation_height, dilation_width;
  int64_t groups;
};

// Where a tap reads: output (i, j) reads the input at (i * row_step + row, j * column_step +
// column), or zero outside of it.
struct ConvolutionTap {
  int64_t row, column;
};

}  // namespace fastprune
