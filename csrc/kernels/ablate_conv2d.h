// ablate_conv2d: the output of a convolution for each of many masked pieces of its weight
//
// output [images, out_channels, height, width]     conv2d(input, weight), and whatever else the
// layer
//                                                  added; channel_stride 1
// input  [images, in_channels, in_height, in_width] any strides; zero outside
// weight [out_channels, in_channels, taps]         any strides, taps row-major
// pieces [pieces][4]                               channel_begin, channel_end, tap_begin, tap_end:
// of
//                                                  the input's channels and the kernel's taps, for
//                                                  all outputs
// masked [pieces][images][height][width][out_channels], contiguous, aliases none of the others:
//   masked[m, n, i, j, o] = act(output[n, o, i, j] - sum over taps t, channels c of piece m:
//       input[n, c, i * row_step + row(t), j * column_step + column(t)] * weight[o, c, t])
// The sum is accumulated in T, taps first, then channels, and subtracted once.
//
// Work: positions of the grid [piece][image], images innermost.
#pragma once

#include "block_sparse_conv2d.h"

namespace fastprune {

// A convolution's weight by strides that count elements.
template <class T>
struct TapWeightView {
  const T* data;
  int64_t output_stride;
  int64_t channel_stride;
  int64_t tap_stride;
};

template <class T>
struct AblateConv2dArgs {
  ImageView<const T> output;
  ImageView<const T> input;
  TapWeightView<T> weight;
  const ConvolutionTap* taps;
  int64_t row_step;
  int64_t column_step;
  const int32_t* pieces;
  int64_t num_pieces;
  Activation activation;
  T* masked;
};

}  // namespace fastprune
