// What the bindings of block_sparse_conv2d and its gradients share: checks, shapes and memory
// formats.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../kernels/block_sparse_conv2d.h"
#include "block_sparse_linear.h"

namespace fastprune {

// Rows and columns of an image, its padding and the reach of a kernel: their sums fit 32 bits.
constexpr int64_t kLargestImage = int64_t{1} << 29;

inline void check_counts(const char* op, const char* name, const std::vector<int64_t>& counts,
                         size_t size, int64_t lowest) {
  if (counts.size() != size) {
    throw_value_error(op, ": `", name, "` must have ", size, " integers, got ", counts.size());
  }
  for (const int64_t count : counts) {
    if (count < lowest || count > kLargestImage) {
      throw_value_error(op, ": `", name, "` must be from ", lowest, " to ", kLargestImage, ", got ",
                        count);
    }
  }
}

// padding: top, bottom, left, right.
inline ConvolutionGeometry convolution_geometry(
    const char* op, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  check_counts(op, "kernel_size", kernel_size, 2, 1);
  check_counts(op, "stride", stride, 2, 1);
  check_counts(op, "padding", padding, 4, 0);
  check_counts(op, "dilation", dilation, 2, 1);
  if (groups < 1) throw_value_error(op, ": `groups` must be >= 1, got ", groups);
  for (int d = 0; d < 2; ++d) {
    if (dilation[d] * (kernel_size[d] - 1) > kLargestImage) {
      throw_value_error(op, ": `kernel_size` and `dilation` must reach at most ", kLargestImage,
                        " pixels, got ", kernel_size[d], " and ", dilation[d]);
    }
  }
  return {kernel_size[0], kernel_size[1], stride[0],   stride[1],   padding[0], padding[1],
          padding[2],     padding[3],     dilation[0], dilation[1], groups};
}

// The same from one list, as the op without gradients takes it: torch converts a list in 0.8 us, as
// long as a convolution of a few small images takes.
inline ConvolutionGeometry convolution_geometry(const char* op,
                                                const std::vector<int64_t>& geometry) {
  if (geometry.size() != 11) {
    throw_value_error(op, ": `geometry` must have 11 integers, got ", geometry.size());
  }
  const auto at = geometry.begin();
  return convolution_geometry(op, {at, at + 2}, {at + 2, at + 4}, {at + 4, at + 8},
                              {at + 8, at + 10}, geometry[10]);
}

// Rows or columns of the output.
inline int64_t output_size(const char* op, const char* what, int64_t size, int64_t before,
                           int64_t after, int64_t kernel, int64_t dilation, int64_t stride) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  if (size < 1 || size > kLargestImage || size + before + after < reach) {
    throw_value_error(op, ": `input` must have a ", what, " from 1 to ", kLargestImage,
                      " that with its padding holds the kernel's ", reach, " pixels, got ", size);
  }
  return (size + before + after - reach) / stride + 1;
}

struct OutputSize {
  int64_t height, width;
};

inline OutputSize output_size(const char* op, int64_t height, int64_t width,
                              const ConvolutionGeometry& geometry) {
  return {output_size(op, "height", height, geometry.padding_top, geometry.padding_bottom,
                      geometry.kernel_height, geometry.dilation_height, geometry.stride_height),
          output_size(op, "width", width, geometry.padding_left, geometry.padding_right,
                      geometry.kernel_width, geometry.dilation_width, geometry.stride_width)};
}

// grad_output must be what the forward of an input of this size returns.
inline void check_grad_output(const char* op, const Tensor& grad_output, int64_t images,
                              int64_t height, int64_t width, const ConvolutionGeometry& geometry) {
  const OutputSize size = output_size(op, height, width, geometry);
  check_size(op, "grad_output", grad_output, 0, images);
  check_size(op, "grad_output", grad_output, 2, size.height);
  check_size(op, "grad_output", grad_output, 3, size.width);
}

// That channels divide into groups, and block rows do not straddle them. Returns the block columns
// of a tap.
inline int64_t check_channels(const char* op, const ConvolutionGeometry& geometry,
                              int64_t in_channels, int64_t out_channels, int64_t rows,
                              int64_t cols) {
  if (out_channels < 0) {
    throw_value_error(op, ": `out_channels` must be >= 0, got ", out_channels);
  }
  if (in_channels % geometry.groups != 0 || out_channels % geometry.groups != 0) {
    throw_value_error(op, ": `groups` must divide the channels, ", in_channels, " and ",
                      out_channels, ", got ", geometry.groups);
  }
  if (geometry.groups > 1 && out_channels / geometry.groups % rows != 0) {
    throw_value_error(op, ": `groups` must have a multiple of the block's ", rows,
                      " rows in output channels, got ", out_channels / geometry.groups);
  }
  const int64_t taps = geometry.kernel_height * geometry.kernel_width;
  const int64_t channel_blocks = ceil_divide(in_channels / geometry.groups, cols);
  const int64_t row_blocks = ceil_divide(out_channels / geometry.groups, rows);
  const int64_t most = channel_blocks > row_blocks ? channel_blocks : row_blocks;
  if (most > 0 && taps > std::numeric_limits<int32_t>::max() / most) {
    throw_value_error(op, ": `kernel_size` must leave fewer than 2**31 block columns, got ",
                      geometry.kernel_height, " x ", geometry.kernel_width);
  }
  return channel_blocks;
}

// The arguments of the weight gradient. Returns the block columns of a tap.
inline int64_t check_conv2d_weight_gradient(const char* op, const Tensor& grad_output,
                                            const Tensor& input, const Tensor& crow_indices,
                                            const Tensor& col_indices, int64_t rows, int64_t cols,
                                            const ConvolutionGeometry& geometry) {
  check_dim(op, "grad_output", grad_output, 4);
  check_dim(op, "input", input, 4);
  check_same_device(op, "input", input, grad_output);
  check_dtype(op, "input", input, grad_output.scalar_type());
  check_indices(op, grad_output, crow_indices, col_indices);
  check_block_sides(op, rows, cols);
  const int64_t channel_blocks =
      check_channels(op, geometry, input.size(1), grad_output.size(1), rows, cols);
  check_size(op, "crow_indices", crow_indices, 0, ceil_divide(grad_output.size(1), rows) + 1);
  check_grad_output(op, grad_output, input.size(0), input.size(2), input.size(3), geometry);
  return channel_blocks;
}

// torch's rule for what counts as channels-last: the strides' order, in doubt contiguous.
inline bool is_channels_last(const Tensor& images) {
  if (images.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (images.size(d) == 0 || images.stride(d) < least) return false;
    if (d == 0 && least == images.stride(1)) return false;
    least = images.stride(d);
    if (images.size(d) > 1) least *= images.size(d);
  }
  return true;
}

// An uninitialised tensor in the memory format of `like`.
inline Tensor empty_images(const Tensor& like, int64_t images, int64_t channels, int64_t height,
                           int64_t width) {
  if (!is_channels_last(like)) return empty_tensor(like, {images, channels, height, width});
  return empty_strided_tensor(like, {images, channels, height, width},
                              {height * width * channels, 1, width * channels, channels});
}

// The taps of the forward, row-major.
inline std::vector<ConvolutionTap> forward_taps(const ConvolutionGeometry& geometry) {
  std::vector<ConvolutionTap> taps;
  for (int64_t y = 0; y < geometry.kernel_height; ++y) {
    for (int64_t x = 0; x < geometry.kernel_width; ++x) {
      taps.push_back({y * geometry.dilation_height - geometry.padding_top,
                      x * geometry.dilation_width - geometry.padding_left});
    }
  }
  return taps;
}

template <class T, class Data>
ImageView<T> image_view(Data* data, const Tensor& images) {
  return {static_cast<T*>(data), images.size(0),   images.size(1),
          images.size(2),        images.size(3),   images.stride(0),
          images.stride(1),      images.stride(2), images.stride(3)};
}

}  // namespace fastprune
