// The grid along which block_convolution numbers its outputs: what each tap may read of it, and
// where its positions lie in an image.
#pragma once

#include "block_convolution.h"
#include "transpose.h"

namespace fastprune {
namespace {

constexpr int kTileVectors = 3;

// Floor of a / b for b > 0.
inline int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What one tap reads for the vectors of one tile.
template <class T>
struct TileTap {
  int64_t offset;  // from the element of the tile's first position, in channel 0
  bool reads;      // whether any lane lies in the input
  LaneMask<T> lanes[kTileVectors];
};

// The phase of the input that a tap reads, of row_step * column_step: with steps of 2 neighbouring
// outputs read every other input, and the inputs of one phase lie side by side in a panel.
template <class T>
int64_t phase_of(const BlockConvolutionArgs<T>& args, const ConvolutionTap& tap) {
  const int64_t row = tap.row - floor_divide(tap.row, args.row_step) * args.row_step;
  const int64_t column =
      tap.column - floor_divide(tap.column, args.column_step) * args.column_step;
  return row * args.column_step + column;
}

// Whether no tap before reads the tap's phase.
template <class T>
bool is_first_of_phase(const BlockConvolutionArgs<T>& args, int64_t tap) {
  for (int64_t t = 0; t < tap; ++t) {
    if (phase_of(args, args.taps[t]) == phase_of(args, args.taps[tap])) return false;
  }
  return true;
}

// How many phases the taps read.
template <class T>
int64_t count_phases(const BlockConvolutionArgs<T>& args) {
  int64_t phases = 0;
  for (int64_t t = 0; t < args.num_taps; ++t) phases += is_first_of_phase(args, t);
  return phases;
}

// The distance along the grid from an output to what a tap reads for it.
template <class T>
int64_t tap_shift(const BlockConvolutionArgs<T>& args, int64_t pitch, const ConvolutionTap& tap) {
  return floor_divide(tap.row, args.row_step) * pitch + floor_divide(tap.column, args.column_step);
}

// The input rows and columns that the lanes of vector `vector` of a sequence read with a tap at
// (0, 0); far outside for positions that are no output.
template <class T>
struct LanePositions {
  static constexpr int64_t kOutside = -(int64_t{1} << 30);
  Vec<IntOf<T>, kLanes<T>> rows, columns;

  LanePositions(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                int64_t vector) {
    const int64_t position = vector * kLanes<T>;
    const int64_t images = work.in_place ? 1 : args.input.images;
    int64_t image = position / (work.rows * work.pitch);
    int64_t row = position / work.pitch % work.rows;
    int64_t column = position % work.pitch;
    IntOf<T> lane_rows[kLanes<T>], lane_columns[kLanes<T>];
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const bool inside =
          image < images && row < args.output.height && column < args.output.width;
      lane_rows[lane] = static_cast<IntOf<T>>(inside ? row * args.row_step : kOutside);
      lane_columns[lane] = static_cast<IntOf<T>>(column * args.column_step);
      if (++column < work.pitch) continue;
      column = 0;
      if (++row < work.rows) continue;
      row = 0;
      ++image;
    }
    rows = load<Vec<IntOf<T>, kLanes<T>>>(lane_rows);
    columns = load<Vec<IntOf<T>, kLanes<T>>>(lane_columns);
  }
};

// The taps of the tile of vectors [first, first + count) of a sequence, into result[num_taps];
// offsets[t] is the tap's distance from a position to the element that it reads.
template <class T>
void make_tile_taps(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                    const int64_t* offsets, int64_t first, int64_t count, TileTap<T>* result) {
  using Int = Vec<IntOf<T>, kLanes<T>>;
  const auto height = static_cast<IntOf<T>>(args.input.height);
  const auto width = static_cast<IntOf<T>>(args.input.width);
  for (int64_t t = 0; t < args.num_taps; ++t) {
    result[t].offset = offsets[t];
    result[t].reads = false;
  }
  for (int64_t v = 0; v < count; ++v) {
    const LanePositions<T> lanes(args, work, first + v);
    for (int64_t t = 0; t < args.num_taps; ++t) {
      const Int row = lanes.rows + static_cast<IntOf<T>>(args.taps[t].row);
      const Int column = lanes.columns + static_cast<IntOf<T>>(args.taps[t].column);
      const Int inside = (row >= 0) & (row < height) & (column >= 0) & (column < width);
      result[t].lanes[v] = lane_mask<T>(inside);
      result[t].reads |= !all_lanes(~inside);
    }
  }
}

// Calls run(image, row, column, lane, count) for the stretches of positions [first, first + count)
// of a grid that lie in images of height x width; `lane` counts positions from `first`. With
// rows_meet, where width is the pitch, a stretch goes on into the next row.
template <class Run>
void for_each_run(int64_t pitch, int64_t rows, int64_t images, int64_t height, int64_t width,
                  bool rows_meet, int64_t first, int64_t count, const Run& run) {
  const int64_t last = images * rows * pitch;
  const int64_t end = first + count < last ? first + count : last;
  int64_t position = first < 0 ? 0 : first;
  while (position < end) {
    const int64_t image = position / (rows * pitch), row = position / pitch % rows;
    const int64_t column = position % pitch;
    if (row >= height) {
      position = (image + 1) * rows * pitch;
    } else if (column >= width) {
      position += pitch - column;
    } else {
      int64_t length = rows_meet ? (height - row) * pitch - column : width - column;
      if (length > end - position) length = end - position;
      run(image, row, column, position - first, length);
      position += length;
    }
  }
}

}  // namespace
}  // namespace fastprune
