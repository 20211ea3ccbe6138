// Copies of images on the grid of convolution_grid.h, channel by channel and, with steps, phase by
// phase: what a tap reads for a vector of outputs lies side by side in them.
#pragma once

#include "convolution_grid.h"
#include "transpose.h"

namespace fastprune {
namespace {

// The channels of one phase of the input at positions [first, first + count) of the grid, in planes
// `stride` elements apart. Positions outside of the images, also before the first, are left as they
// are.
template <class T>
void copy_phase(const TapGrid& grid, const ImageView<const T>& input, int64_t phase, int64_t first,
                int64_t count, T* planes, int64_t stride) {
  const int64_t row_phase = phase / grid.column_step, column_phase = phase % grid.column_step;
  const int64_t height = ceil_divide(input.height - row_phase, grid.row_step);
  const int64_t width = ceil_divide(input.width - column_phase, grid.column_step);
  const int64_t step = grid.column_step * input.column_stride;
  const bool rows_meet =
      width == grid.pitch && grid.row_step * input.row_stride == grid.pitch * step;
  const T* data = input.data + row_phase * input.row_stride + column_phase * input.column_stride;
  for_each_run(grid, height, width, rows_meet, first, count,
               [&](int64_t image, int64_t row, int64_t column, int64_t lane, int64_t length) {
                 const T* source = data + image * input.image_stride +
                                   row * grid.row_step * input.row_stride + column * step;
                 T* target = planes + lane;
                 if (input.channel_stride == 1) {
                   transpose<T, true>(source, step, length, input.channels, target, stride);
                   return;
                 }
                 for (int64_t c = 0; c < input.channels; ++c) {
                   const T* channel = source + c * input.channel_stride;
                   if (step == 1) {
                     __builtin_memcpy(target + c * stride, channel, length * sizeof(T));
                   } else {
                     for (int64_t i = 0; i < length; ++i) {
                       target[c * stride + i] = channel[i * step];
                     }
                   }
                 }
               });
}

// The same for all phases that the taps read, one after the other.
template <class T>
void copy_phases(const TapGrid& grid, const ImageView<const T>& input, int64_t first, int64_t count,
                 T* planes, int64_t stride) {
  for (int64_t t = 0; t < grid.num_taps; ++t) {
    if (!is_first_of_phase(grid, t)) continue;
    copy_phase(grid, input, phase_of(grid, grid.taps[t]), first, count, planes, stride);
    planes += input.channels * stride;
  }
}

}  // namespace
}  // namespace fastprune
