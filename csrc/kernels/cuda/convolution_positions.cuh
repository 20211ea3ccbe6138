// A thread's walk over output positions of a convolution, and where one tap reads at each of them.
// No division but at its start: a step adds what the host has divided, and passes at most one end
// of a row and one of an image.
#pragma once

#include "convolution_positions.h"

namespace fastprune {

struct PixelWalk {
  int32_t row = 0, column = 0;  // of the input; outside of it a tap reads zeros
  int32_t row_end = 0, column_end = 0;
  uint32_t pixel = 0;  // counted over all images

  __device__ __forceinline__ void start(const ConvolutionPositions& positions, uint32_t tap,
                                        uint32_t position) {
    const uint32_t output_row = position / positions.output_width;
    const uint32_t output_column = position - output_row * positions.output_width;
    const uint32_t image = output_row / positions.output_height;
    const uint32_t tap_row = tap / positions.kernel_width;
    const uint32_t tap_column = tap - tap_row * positions.kernel_width;
    const auto first_row =
        static_cast<int32_t>(tap_row * positions.dilation_height - positions.padding_top);
    const auto first_column =
        static_cast<int32_t>(tap_column * positions.dilation_width - positions.padding_left);
    row = first_row +
          static_cast<int32_t>(output_row - image * positions.output_height) * positions.row_step;
    column = first_column + static_cast<int32_t>(output_column) * positions.column_step;
    row_end = first_row + positions.row_span;
    column_end = first_column + positions.column_span;
    pixel = (image * positions.height + row) * positions.width + column;
  }

  __device__ __forceinline__ bool is_inside(const ConvolutionPositions& positions) const {
    return static_cast<uint32_t>(row) < static_cast<uint32_t>(positions.height) &&
           static_cast<uint32_t>(column) < static_cast<uint32_t>(positions.width);
  }

  __device__ __forceinline__ void advance(const ConvolutionPositions& positions) {
    row += positions.advance_row;
    column += positions.advance_column;
    pixel += positions.advance_pixels;
    if (column >= column_end) {
      column -= positions.column_span;
      row += positions.row_step;
      pixel += positions.next_row_pixels;
    }
    if (row >= row_end) {
      row -= positions.row_span;
      pixel += positions.next_image_pixels;
    }
  }
};

}  // namespace fastprune
