// block_sparse_conv2d and its input gradient as products of ../block_product.h: the numbers by
// which a kernel finds its way, worked out on the host. Plain C++, without CUDA's headers.
//
// A sample of the product is a position (image, i, j) of the output. Source t * sources_per_tap + b
// of a list is block b of the channels, of the list's group, at the pixel that tap t reads:
// (i * row_step + row of t, j * column_step + column of t), or zeros outside of the image. Images
// are channels-last, without gaps.
//
// Input gradient: the input is the gradient of the output, and the taps read backwards. With
// strides, inputs of one phase (their row and column modulo the stride) get gradients from some of
// the taps only: each phase is a product of its own, whose output is every stride-th pixel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../block_product.h"
#include "../block_sparse_conv2d.h"

#ifdef __CUDACC__
#define FASTPRUNE_HOST_DEVICE __host__ __device__
#else
#define FASTPRUNE_HOST_DEVICE
#endif

namespace fastprune {

// A divisor of numbers below 2^31, by a multiplication: n / divisor is the upper half of
// 2 n * multiplier, shifted to the right. Source: Granlund and Montgomery, Division by Invariant
// Integers using Multiplication (1994), theorem 4.2.
struct Divisor {
  uint32_t divisor, multiplier, shift;
};

// Of what is empty nothing is divided: 0 counts as 1.
inline Divisor divisor_of(int64_t divisor) {
  divisor = std::max<int64_t>(divisor, 1);
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const int64_t multiplier = ((int64_t{1} << (31 + shift)) + divisor - 1) / divisor;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), shift};
}

// What samples read.
struct PatchGeometry {
  int64_t rows;        // samples
  int64_t cols;        // channels of a group
  int64_t image_size;  // elements
  int32_t height, width, channels;
  int32_t row_step, column_step;
  // Tap (y, x) reads at (first_row + y * row_spacing, first_column + x * column_spacing).
  int32_t first_row, row_spacing, first_column, column_spacing;
  Divisor taps_across, taps, sources_per_tap;
  Divisor output_width, output_height;  // of the positions that samples are
  // The entries of list l: from offsets[l * list_stride + list_begin] to
  // offsets[l * list_stride + list_end].
  int32_t lists_per_group, list_stride, list_begin, list_end;
};

// Where samples are written: every so many elements of the output.
struct PositionGeometry {
  int64_t cols;  // outputs, of which every group but the last has group_cols
  int64_t first, image_stride, row_stride, column_stride;
  Divisor group_cols;      // outputs of a group's lists: its last block may reach past its channels
  int32_t group_channels;  // outputs that exist
};

template <class T>
struct PatchView : PatchGeometry {
  const T* data;
};

template <class T>
struct PositionView : PositionGeometry {
  T* data;
};

template <class T>
struct ConvolutionProductArgs {
  PatchView<T> input;
  BlockLists<T> weight;
  const T* bias;  // [output channels] or null
  PositionView<T> output;
  Activation activation;
};

// The taps of one dimension by class: k and k + period read inputs of the same phase, and the taps
// of a class are neighbours.
struct TapClasses {
  int32_t taps, period;

  FASTPRUNE_HOST_DEVICE int32_t count(int32_t tap_class) const {
    return (taps - tap_class + period - 1) / period;
  }
  // Taps of the classes before one.
  FASTPRUNE_HOST_DEVICE int32_t before(int32_t tap_class) const {
    const int32_t more = taps % period;
    return tap_class * (taps / period) + (tap_class < more ? tap_class : more);
  }
};

inline TapClasses tap_classes(int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t period = stride / std::gcd(stride, dilation);
  return {static_cast<int32_t>(kernel), static_cast<int32_t>(std::min(period, kernel))};
}

// Where a tap stands in the order of classes (rows before columns) and of taps within a class.
struct TapRank {
  int32_t first;   // of the tap's class
  int32_t within;  // the class
};

FASTPRUNE_HOST_DEVICE inline TapRank tap_rank(const TapClasses& rows, const TapClasses& columns,
                                              int32_t tap) {
  const int32_t y = tap / columns.taps, x = tap % columns.taps;
  const int32_t row_class = y % rows.period, column_class = x % columns.period;
  return {
      rows.before(row_class) * columns.taps + rows.count(row_class) * columns.before(column_class),
      y / rows.period * columns.count(column_class) + x / columns.period};
}

// The taps by which inputs of one phase get gradients, of one dimension: they are a class, or none.
struct PhaseTaps {
  int32_t tap_class, count;
  int64_t first, spacing;  // tap k of them reads the gradient at `first` + k * `spacing`
};

inline PhaseTaps phase_taps(int64_t phase, int64_t kernel, int64_t stride, int64_t padding,
                            int64_t dilation) {
  const TapClasses classes = tap_classes(kernel, stride, dilation);
  for (int32_t k = 0; k < classes.period; ++k) {
    const int64_t distance = phase + padding - k * dilation;
    if (distance % stride == 0) {
      return {k, classes.count(k), distance / stride, -(dilation / std::gcd(stride, dilation))};
    }
  }
  return {0, 0, 0, 0};
}

}  // namespace fastprune
