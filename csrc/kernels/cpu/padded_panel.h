// Copies of images on a grid that has zeros where taps read outside of an image, so that what a tap
// reads lies at one distance from all outputs and needs no mask.
//
//   a 3x3 kernel, padding 1, images of 4 columns and 2 rows: a pitch of 5, 3 rows for each image
//
//         0 0 0 0 0    before the first image
//         a a a a 0    the zero behind a row is also the one before the next row,
//         a a a a 0
//         0 0 0 0 0    and the row of zeros behind an image the one before the next image
//         b b b b 0
//         b b b b 0
//         0 0 0 0 0    after the last image
//
// With steps, each phase of the input is such a copy (convolution_grid.h).
#pragma once

#include "convolution_grid.h"
#include "transpose.h"

namespace fastprune {
namespace {

// Sets the grid's pitch and rows: the fewest with which no tap meets another row's inputs.
inline void pad_grid(TapGrid& grid) {
  grid.pitch = grid.output_width;
  grid.rows = grid.output_height;
  const auto at_least = [](int64_t& size, int64_t least) { size = size < least ? least : size; };
  for (int64_t t = 0; t < grid.num_taps; ++t) {
    const ConvolutionTap& tap = grid.taps[t];
    if (!tap_reads(grid, tap)) continue;
    const int64_t row = floor_divide(tap.row, grid.row_step);
    const int64_t column = floor_divide(tap.column, grid.column_step);
    const int64_t height =
        ceil_divide(grid.input_height - (tap.row - row * grid.row_step), grid.row_step);
    const int64_t width =
        ceil_divide(grid.input_width - (tap.column - column * grid.column_step), grid.column_step);
    at_least(grid.pitch, width + (column < 0 ? -column : 0));
    at_least(grid.pitch, grid.output_width + column);
    at_least(grid.rows, height + (row < 0 ? -row : 0));
    at_least(grid.rows, grid.output_height + row);
  }
}

// The bounds of the taps' shifts: how many positions are read before an output's own, and after.
struct Reach {
  int64_t before = 0, after = 0;
};

inline Reach reach_of(const TapGrid& grid) {
  Reach reach;
  for (int64_t t = 0; t < grid.num_taps; ++t) {
    if (!tap_reads(grid, grid.taps[t])) continue;
    const int64_t shift = tap_shift(grid, grid.taps[t]);
    if (-shift > reach.before) reach.before = -shift;
    if (shift > reach.after) reach.after = shift;
  }
  return reach;
}

// Zeros to target[from, to) and up to a vector's end past it.
template <class T>
void set_zeros(T* target, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; i += kLanes<T>) store(target + i, Vec<T, kLanes<T>>{});
}

// Every second element of two neighbouring vectors, from the first.
template <class T, int... I>
inline Vec<T, kLanes<T>> even_elements(Vec<T, kLanes<T>> a, Vec<T, kLanes<T>> b,
                                       std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * I)...);
#else
  return __builtin_shuffle(a, b, Vec<IntOf<T>, kLanes<T>>{(2 * I)...});
#endif
}

// Copies `length` elements that are `step` apart, and zeros up to the end of the last vector.
template <class T>
void copy_padded(const T* source, int64_t step, int64_t length, T* target) {
  using V = Vec<T, kLanes<T>>;
  constexpr int64_t kVector = kLanes<T>;
  int64_t i = 0;
  if (step == 1) {
    for (; i + kVector <= length; i += kVector) store(target + i, load<V>(source + i));
    if (i < length) store(target + i, load_lanes<T>(first_lanes<T>(length - i), source + i));
  } else if (step == 2) {
    using Lanes = std::make_integer_sequence<int, kLanes<T>>;
    // Of the last vector's sources only those up to its last element need exist.
    for (; i + kVector < length; i += kVector) {
      const T* from = source + 2 * i;
      store(target + i, even_elements<T>(load<V>(from), load<V>(from + kVector), Lanes{}));
    }
    if (i < length) {
      const int64_t left = 2 * (length - i) - 1;
      const T* from = source + 2 * i;
      const V low = load_lanes<T>(first_lanes<T>(left), from);
      const V high = load_lanes<T>(first_lanes<T>(left - kVector), from + kVector);
      store(target + i, even_elements<T>(low, high, Lanes{}));
    }
  } else {
    for (; i < length; ++i) target[i] = source[i * step];
    for (; i % kVector != 0; ++i) target[i] = T{};
  }
}

// target[c * stride + r] = source[r * row_stride + c] for `length` rows r, and zeros in the rows up
// to the end of the last vector.
template <class T>
void transpose_padded(const T* source, int64_t row_stride, int64_t length, int64_t channels,
                      T* target, int64_t stride) {
  constexpr int64_t kVector = kLanes<T>;
  const int64_t full = length - length % kVector;
  transpose<T, true>(source, row_stride, full, channels, target, stride);
  if (full == length) return;
  source += full * row_stride;
  target += full;
  const int64_t left = length - full;
  int64_t c = 0;
  for (; c + kVector <= channels; c += kVector) {
    transpose_first_rows<T, kLanes<T>>(source + c, row_stride, left, target + c * stride, stride);
  }
  for (; c < channels; ++c) {
    set_zeros(target + c * stride, 0, kVector);
    for (int64_t r = 0; r < left; ++r) target[c * stride + r] = source[r * row_stride + c];
  }
}

// The channels of one phase of the input at positions [first, first + count) of the grid, in planes
// `stride` elements apart, which is at least a vector more than count; zeros where the grid has no
// input.
template <class T>
void fill_phase(const TapGrid& grid, const ImageView<const T>& input, int64_t phase, int64_t first,
                int64_t count, T* planes, int64_t stride) {
  const int64_t row_phase = phase / grid.column_step, column_phase = phase % grid.column_step;
  const int64_t height = ceil_divide(input.height - row_phase, grid.row_step);
  const int64_t width = ceil_divide(input.width - column_phase, grid.column_step);
  const int64_t row_stride = grid.row_step * input.row_stride;
  const int64_t step = grid.column_step * input.column_stride;
  const bool rows_meet = width == grid.pitch && row_stride == grid.pitch * step;
  const T* data = input.data + row_phase * input.row_stride + column_phase * input.column_stride;
  const auto source_of = [&](int64_t image, int64_t row, int64_t column) {
    return data + image * input.image_stride + row * row_stride + column * step;
  };
  const auto vectors_end = [](int64_t end, int64_t begin) {
    return begin + ceil_divide(end - begin, kLanes<T>) * kLanes<T>;
  };
  constexpr int64_t kLine = 64 / sizeof(T);
  if (input.channel_stride == 1 && input.channels > 1) {
    int64_t filled = 0;
    for_each_run(grid, height, width, rows_meet, first, count,
                 [&](int64_t image, int64_t row, int64_t column, int64_t lane, int64_t length) {
                   for (int64_t c = 0; c < input.channels; ++c) {
                     set_zeros(planes + c * stride, filled, lane);
                   }
                   transpose_padded(source_of(image, row, column), step, length, input.channels,
                                    planes + lane, stride);
                   filled = vectors_end(lane + length, lane);
                 });
    for (int64_t c = 0; c < input.channels; ++c) set_zeros(planes + c * stride, filled, count);
    return;
  }
  for (int64_t c = 0; c < input.channels; ++c, planes += stride) {
    int64_t filled = 0;
    for_each_run(grid, height, width, rows_meet, first, count,
                 [&](int64_t image, int64_t row, int64_t column, int64_t lane, int64_t length) {
                   const T* source = source_of(image, row, column) + c * input.channel_stride;
                   // The hardware does not follow from one channel to the next.
                   for (int64_t i = 0; i < length * step; i += kLine) {
                     __builtin_prefetch(source + input.channel_stride + i);
                   }
                   set_zeros(planes, filled, lane);
                   copy_padded(source, step, length, planes + lane);
                   filled = vectors_end(lane + length, lane);
                 });
    set_zeros(planes, filled, count);
  }
}

// The same for all phases that the taps read, one after the other.
template <class T>
void fill_panel(const TapGrid& grid, const ImageView<const T>& input, int64_t first, int64_t count,
                T* planes, int64_t stride) {
  for (int64_t t = 0; t < grid.num_taps; ++t) {
    if (!is_first_of_phase(grid, t)) continue;
    fill_phase(grid, input, phase_of(grid, grid.taps[t]), first, count, planes, stride);
    planes += input.channels * stride;
  }
}

}  // namespace
}  // namespace fastprune
