// Images whose channels lie side by side, for kernels that read them so.
#pragma once

#include "block_sparse_conv2d.h"

namespace fastprune {

inline Tensor channels_last_copy(const Tensor& images) {
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  Tensor result = empty_strided_tensor(images, {images.size(0), channels, height, width},
                                       {height * width * channels, 1, width * channels, channels});
  torch::stable::copy_(result, images);
  return result;
}

// The tensor itself where the channels lie side by side, whatever lies between pixels.
inline Tensor with_adjacent_channels(const Tensor& images) {
  return images.size(1) <= 1 || images.stride(1) == 1 ? images : channels_last_copy(images);
}

// The tensor itself where it is channels-last without gaps.
inline Tensor as_channels_last(const Tensor& images) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (images.size(d) > 1 && images.stride(d) != expected) return channels_last_copy(images);
    expected *= images.size(d);
  }
  return images;
}

}  // namespace fastprune
