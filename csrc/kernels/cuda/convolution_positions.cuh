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

  // Whether a `wanted` pixel exists: one chain of predicates, no branch.
  __device__ __forceinline__ bool is_inside(const ConvolutionPositions& positions,
                                            bool wanted) const {
    return wanted & (static_cast<uint32_t>(row) < static_cast<uint32_t>(positions.height)) &
           (static_cast<uint32_t>(column) < static_cast<uint32_t>(positions.width));
  }

  // Additions under a predicate: the compiler would select what to add, and then add it.
  __device__ __forceinline__ void advance(const ConvolutionPositions& positions) {
    row += positions.advance_row;
    column += positions.advance_column;
    pixel += positions.advance_pixels;
    asm("{ .reg .pred %%p0;\n"
        "  setp.ge.s32 %%p0, %1, %3;\n"
        "  @%%p0 add.s32 %0, %0, %4;\n"
        "  @%%p0 sub.s32 %1, %1, %5;\n"
        "  @%%p0 add.u32 %2, %2, %6; }"
        : "+r"(row), "+r"(column), "+r"(pixel)
        : "r"(column_end), "r"(positions.row_step), "r"(positions.column_span),
          "r"(positions.next_row_pixels));
    asm("{ .reg .pred %%p0;\n"
        "  setp.ge.s32 %%p0, %0, %2;\n"
        "  @%%p0 sub.s32 %0, %0, %3;\n"
        "  @%%p0 add.u32 %1, %1, %4; }"
        : "+r"(row), "+r"(pixel)
        : "r"(row_end), "r"(positions.row_span), "r"(positions.next_image_pixels));
  }
};

}  // namespace fastprune
