// Output pixels of a convolution, numbered image by image, row by row, and what a tap reads for
// them.
#pragma once

#include "convolution_grid.h"

namespace fastprune {
namespace {

// Calls run(image, row, column, count) for the stretches of pixels [first, last) that lie in one
// row of images of height x width.
template <class Run>
void for_each_row(int64_t height, int64_t width, int64_t first, int64_t last, const Run& run) {
  int64_t image = first / (height * width), row = first / width % height, column = first % width;
  while (first < last) {
    const int64_t count = width - column < last - first ? width - column : last - first;
    run(image, row, column, count);
    first += count;
    column = 0;
    if (++row < height) continue;
    row = 0;
    ++image;
  }
}

// Of a stretch of `count` outputs from `column` on: for outputs [first, last), counted within the
// stretch, the tap reads within the image.
struct InsideRun {
  int64_t first, last;
};

// `tap`, `step` and `inputs` are those of the columns.
inline InsideRun inside_run(int64_t tap, int64_t step, int64_t inputs, int64_t column,
                            int64_t count) {
  const int64_t begin = -floor_divide(tap, step) - column;
  const int64_t end = floor_divide(inputs - 1 - tap, step) + 1 - column;
  const int64_t first = begin < 0 ? 0 : begin < count ? begin : count;
  return {first, end < first ? first : end < count ? end : count};
}

}  // namespace
}  // namespace fastprune
