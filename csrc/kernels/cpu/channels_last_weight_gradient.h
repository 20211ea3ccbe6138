// The weight gradient of block_sparse_conv2d with vectors along a block's rows, for images in
// channels-last format: nothing is copied. A block's rows fill whole vectors, and
// input.channel_stride and grad_output.channel_stride are 1.
//
// Sums accumulate in T over chunks of output pixels, and then over the chunks: the order depends on
// the sizes alone.
#pragma once

#include "../block_sparse_conv2d_weight_gradient.h"

namespace fastprune {

// How the work is cut: positions are kept blocks, all of equal cost.
struct ChannelsLastWeightGradientWork {
  int64_t pixels;        // of the outputs, image by image, row by row
  int64_t chunks;        // chunk c has pixels [c * pixels / chunks, (c + 1) * pixels / chunks)
  int64_t total;         // kept blocks
  int64_t scratch_size;  // elements that each thread needs, aligned to 64 bytes
};

}  // namespace fastprune
