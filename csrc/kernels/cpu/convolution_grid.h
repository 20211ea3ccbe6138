// The grid along which convolutions number their outputs: what each tap reads of it, and where its
// positions lie in an image.
#pragma once

#include "../block_sparse_conv2d.h"
#include "vec.h"

namespace fastprune {
namespace {

// Floor of a / b for b > 0.
inline int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of `pitch` columns and `rows` rows for each image, no narrower than the outputs and than
// the inputs of one phase, so that what a tap reads lies at one distance from all outputs.
struct TapGrid {
  const ConvolutionTap* taps;
  int64_t num_taps;
  int64_t row_step;  // between the inputs of neighbouring outputs
  int64_t column_step;
  int64_t input_height, input_width;
  int64_t output_height, output_width;
  int64_t images;
  int64_t pitch;
  int64_t rows;
};

// The phase of the input that a tap reads, of row_step * column_step: with steps of 2 neighbouring
// outputs read every other input, and the inputs of one phase lie side by side in a copy.
inline int64_t phase_of(const TapGrid& grid, const ConvolutionTap& tap) {
  const int64_t row = tap.row - floor_divide(tap.row, grid.row_step) * grid.row_step;
  const int64_t column = tap.column - floor_divide(tap.column, grid.column_step) * grid.column_step;
  return row * grid.column_step + column;
}

// Whether no tap before reads the tap's phase.
inline bool is_first_of_phase(const TapGrid& grid, int64_t tap) {
  for (int64_t t = 0; t < tap; ++t) {
    if (phase_of(grid, grid.taps[t]) == phase_of(grid, grid.taps[tap])) return false;
  }
  return true;
}

// How many phases taps [0, taps) read.
inline int64_t count_phases(const TapGrid& grid, int64_t taps) {
  int64_t phases = 0;
  for (int64_t t = 0; t < taps; ++t) phases += is_first_of_phase(grid, t);
  return phases;
}

// The place of a tap's phase among those that are read, in the order of their first taps.
inline int64_t phase_rank(const TapGrid& grid, int64_t tap) {
  int64_t first = 0;
  while (phase_of(grid, grid.taps[first]) != phase_of(grid, grid.taps[tap])) ++first;
  return count_phases(grid, first);
}

// The distance along the grid from an output to what a tap reads for it.
inline int64_t tap_shift(const TapGrid& grid, const ConvolutionTap& tap) {
  return floor_divide(tap.row, grid.row_step) * grid.pitch +
         floor_divide(tap.column, grid.column_step);
}

// Whether a tap reads the input for any output.
inline bool tap_reads(const TapGrid& grid, const ConvolutionTap& tap) {
  const auto reads = [](int64_t first, int64_t step, int64_t outputs, int64_t inputs) {
    // The first output that reads past the input's beginning.
    const int64_t output = first < 0 ? ceil_divide(-first, step) : 0;
    return output < outputs && first + output * step < inputs;
  };
  return reads(tap.row, grid.row_step, grid.output_height, grid.input_height) &&
         reads(tap.column, grid.column_step, grid.output_width, grid.input_width);
}

// Calls run(image, row, column, lane, count) for the stretches of positions [first, first + count)
// of a grid that lie in images of height x width; `lane` counts positions from `first`. With
// rows_meet, where width is the pitch, a stretch goes on into the next row.
template <class Run>
void for_each_run(const TapGrid& grid, int64_t height, int64_t width, bool rows_meet, int64_t first,
                  int64_t count, const Run& run) {
  const int64_t image_positions = grid.rows * grid.pitch;
  const int64_t last = grid.images * image_positions;
  const int64_t end = first + count < last ? first + count : last;
  int64_t position = first < 0 ? 0 : first;
  if (position >= end) return;
  int64_t image = position / image_positions, row = position / grid.pitch % grid.rows;
  int64_t column = position % grid.pitch;
  while (position < end) {
    if (row < height && column < width) {
      int64_t length = rows_meet ? (height - row) * grid.pitch - column : width - column;
      if (length > end - position) length = end - position;
      run(image, row, column, position - first, length);
    }
    position += grid.pitch - column;
    column = 0;
    ++row;
    if (row < height && !rows_meet) continue;
    position += (grid.rows - row) * grid.pitch;
    row = 0;
    ++image;
  }
}

}  // namespace
}  // namespace fastprune
