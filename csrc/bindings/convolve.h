// Runs the convolution that block_sparse_conv2d's forward and its input gradient share.
#pragma once

#include <optional>

#include "multiply.h"

namespace fastprune {

// Channels-last images as a matrix of pixels by channels, or nothing where their memory is none.
template <class T>
std::optional<MatrixView<T>> pixels_of(const ImageView<T>& images) {
  const bool is_matrix = (images.channels == 1 || images.channel_stride == 1) &&
                         images.row_stride == images.width * images.column_stride &&
                         images.image_stride == images.height * images.row_stride;
  if (!is_matrix) return std::nullopt;
  return MatrixView<T>{images.data, images.images * images.height * images.width, images.channels,
                       images.column_stride};
}

// A kernel of one pixel that reads where it writes, as a product of pixels and weights.
template <class T>
std::optional<BlockProductArgs<T>> as_product(const BlockConvolutionArgs<T>& args) {
  const bool is_pointwise =
      args.num_taps == 1 && args.taps[0].row == 0 && args.taps[0].column == 0 &&
      args.row_step == 1 && args.column_step == 1 && args.groups == 1 &&
      args.input.height == args.output.height && args.input.width == args.output.width;
  if (!is_pointwise) return std::nullopt;
  const auto input = pixels_of(args.input);
  const auto output = pixels_of(args.output);
  if (!input || !output) return std::nullopt;
  return BlockProductArgs<T>{*input, args.weight, args.bias, *output, args.activation};
}

template <class T>
void convolve(const BlockConvolutionArgs<T>& args) {
  if (args.output.images == 0 || args.output.channels == 0) return;
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const auto& weight = args.weight;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t multiply_adds = args.output.images * args.output.height * args.output.width *
                                weight.outputs * weight.steps * weight.offsets[weight.lists];
  const auto product = as_product(args);
  if (kernels.serves_channels_last_convolution(args)) {
    const ChannelsLastWork work = kernels.plan_channels_last_convolution(args, threads);
    // With one vector the product is faster (AVX2, 8x8 blocks, EfficientNet-Lite0's 1x1 layers: 1.1
    // times), with two the kernel that transposes nothing (16x16: 1.3 times).
    if (!product || work.vectors > 1) {
      const auto run = [&](int64_t begin, int64_t end, T* scratch) {
        kernels.channels_last_convolution(args, work, begin, end, scratch);
      };
      return parallel_kernel<T>(work.total, multiply_adds, work.scratch_size, run);
    }
  }
  if (product) return multiply<T>(*product);
  const BlockConvolutionWork work = kernels.plan_block_convolution(args, threads);
  parallel_kernel<T>(work.total, multiply_adds, work.scratch_size,
                     [&](int64_t begin, int64_t end, T* scratch) {
                       kernels.block_convolution(args, work, begin, end, scratch);
                     });
}

}  // namespace fastprune
