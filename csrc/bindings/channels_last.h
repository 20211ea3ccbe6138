// Images whose channels lie side by side, for kernels that read them so.
#pragma once

#include "block_sparse_conv2d.h"

namespace fastprune {

// An uninitialised tensor with the dtype and the device of `like`.
inline Tensor empty_channels_last(const Tensor& like, int64_t images, int64_t channels,
                                  int64_t height, int64_t width) {
  return empty_strided_tensor(like, {images, channels, height, width},
                              {height * width * channels, 1, width * channels, channels});
}

inline Tensor channels_last_copy(const Tensor& images) {
  Tensor result =
      empty_channels_last(images, images.size(0), images.size(1), images.size(2), images.size(3));
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
