// The output positions of a convolution, numbered (image, row, column), and the pixels of
// channels-last images that a tap reads at them. Plain C++: the host fills it in, the kernels walk
// it (convolution_positions.cuh).
#pragma once

#include <cstdint>
#include <optional>

#include "../block_sparse_conv2d.h"

namespace fastprune {

// Pixels are counted modulo 2^32, since a tap reads outside of the images too.
struct ConvolutionPositions {
  int32_t height, width;  // of the input's images
  int32_t output_height, output_width;
  int32_t row_step, column_step;  // between the inputs of neighbouring outputs
  int32_t kernel_width;
  int32_t padding_top, padding_left;
  int32_t dilation_height, dilation_width;
  int32_t row_span, column_span;        // from the first output of an image to that past the last
  int32_t advance_row, advance_column;  // of the input, from one position of a walk to its next
  uint32_t advance_pixels;              // the same, before it is wrapped
  uint32_t next_row_pixels;             // added where a walk passes the end of a row,
  uint32_t next_image_pixels;           // and of an image
};

// Of walks that take every `apart`-th position. Nothing where 32 bits do not hold what they count.
inline std::optional<ConvolutionPositions> convolution_positions(
    int64_t images, int64_t height, int64_t width, int64_t output_height, int64_t output_width,
    const ConvolutionGeometry& geometry, int64_t apart) {
  // A walk is at most two spans past the last pixel that a tap reads.
  constexpr int64_t kMaxSide = int64_t{1} << 28;
  constexpr int64_t kMaxPixels = 2147483647;
  const auto fits = [](int64_t size, int64_t before, int64_t after, int64_t outputs, int64_t stride,
                       int64_t kernel, int64_t dilation) {
    for (const int64_t length : {size, before, after, outputs, stride, kernel, dilation}) {
      if (length < 0 || length > kMaxSide) return false;
    }
    return size >= 1 && outputs >= 1 && stride >= 1 && size + before + after <= kMaxSide &&
           outputs * stride <= 2 * kMaxSide && (kernel - 1) * dilation <= kMaxSide;
  };
  if (images < 0 ||
      !fits(height, geometry.padding_top, geometry.padding_bottom, output_height,
            geometry.stride_height, geometry.kernel_height, geometry.dilation_height) ||
      !fits(width, geometry.padding_left, geometry.padding_right, output_width,
            geometry.stride_width, geometry.kernel_width, geometry.dilation_width)) {
    return std::nullopt;
  }
  if (images > 0 && (height * width > kMaxPixels / images ||
                     output_height * output_width > kMaxPixels / images)) {
    return std::nullopt;
  }
  const int64_t advance_images = apart / (output_height * output_width);
  const int64_t advance_row = apart / output_width % output_height * geometry.stride_height;
  const int64_t advance_column = apart % output_width * geometry.stride_width;
  const int64_t row_span = output_height * geometry.stride_height;
  const int64_t column_span = output_width * geometry.stride_width;
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  ConvolutionPositions positions;
  positions.height = narrow(height);
  positions.width = narrow(width);
  positions.output_height = narrow(output_height);
  positions.output_width = narrow(output_width);
  positions.row_step = narrow(geometry.stride_height);
  positions.column_step = narrow(geometry.stride_width);
  positions.kernel_width = narrow(geometry.kernel_width);
  positions.padding_top = narrow(geometry.padding_top);
  positions.padding_left = narrow(geometry.padding_left);
  positions.dilation_height = narrow(geometry.dilation_height);
  positions.dilation_width = narrow(geometry.dilation_width);
  positions.row_span = narrow(row_span);
  positions.column_span = narrow(column_span);
  positions.advance_row = narrow(advance_row);
  positions.advance_column = narrow(advance_column);
  positions.advance_pixels =
      static_cast<uint32_t>((advance_images * height + advance_row) * width + advance_column);
  positions.next_row_pixels = static_cast<uint32_t>(geometry.stride_height * width - column_span);
  positions.next_image_pixels = static_cast<uint32_t>((height - row_span) * width);
  return positions;
}

}  // namespace fastprune
