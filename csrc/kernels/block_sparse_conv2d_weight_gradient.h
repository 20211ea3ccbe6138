// The gradient of block_sparse_conv2d in the kept blocks of its weight:
//
//   grad_values[k][c][r] = sum_n,i,j grad_output[n, row_k * rows + r, i, j] *
//       input[n, channel_k + c, i * row_step + row_t, j * column_step + column_t]
//
// with tap t and the first channel of block k from col_indices[k] and the group of its block row
//
// input       [images, in_channels, height, width], any strides; zero outside
// grad_output [images, out_channels, output_height, output_width], any strides
// grad_values [kept][cols][rows], must not alias an argument; padded rows and columns are set to
//             zero
//
// Sums accumulate in T, in each lane over all images and then over the lanes, in an order that
// depends on the sizes alone: the bits do not depend on the number of threads. On CUDA they
// accumulate in float, also for 16-bit T, in slices of the output positions that depend on the
// sizes alone, and whose sums are added in order.
#pragma once

#include "block_sparse_conv2d.h"

namespace fastprune {

template <class T>
struct BlockSparseConv2dWeightGradientArgs {
  ImageView<const T> input;
  ImageView<const T> grad_output;
  const int32_t* crow_indices;  // as in BlockSparseView
  const int32_t* col_indices;
  int64_t block_rows;
  int64_t rows;
  int64_t cols;
  int64_t channel_blocks;  // block columns of a tap
  int64_t groups;
  const ConvolutionTap* taps;
  int64_t num_taps;
  int64_t row_step;  // between the inputs of neighbouring outputs
  int64_t column_step;
  T* grad_values;
};

// How the work is cut: positions are kept blocks, all of equal cost. Both tensors are read from
// copies of `image_size` elements an image, in which outputs are numbered along a grid of `pitch`
// columns and `rows` rows, as in block_convolution.
struct BlockSparseConv2dWeightGradientWork {
  int64_t pitch;
  int64_t rows;
  int64_t vectors;         // that hold an image's outputs
  int64_t total;           // kept blocks
  int64_t input_channels;  // of a copy: those of each phase that a tap reads
  int64_t before;          // positions that an input plane holds before the first output's
  int64_t input_plane;     // elements of one channel
  int64_t output_plane;
  int64_t image_size;
};

}  // namespace fastprune
