// updated_conv2d: what follows from a 3x3 convolution of stride 1 when its input changes
//
// known      [images][height][width][out_channels]      a value that the convolution was added to
// input      [images][in_height][in_width][in_channels] what it was applied to
// new_input  as input
// addend     as known, or null                          another summand of the value
// new_addend as known, or null, both or neither
// output     as known, aliases none of the others:
//   output = act(known + conv2d(new_input - input, weight) + (new_addend - addend))
// All are channels-last without gaps. Differences are taken first, so that what rounds off is a
// small part of the change and not of the value, and where nothing changes output = act(known).
//
// weight     [36][ceil(out_channels / 16)][in_channels][16], zeros in the padding: the transformed
//            weight of Lavin and Gray, Fast algorithms for convolutional neural networks (2016),
//            section 4.3, F(4x4, 3x3): G w G^T. Each tile of 4x4 outputs takes 36 multiplications
//            for each pair of channels instead of 144. Sums are accumulated in T, in the order of
//            the channels.
//
// Work: positions of the grid [chunk of tiles][group of outputs], groups innermost.
#pragma once

#include "types.h"

namespace fastprune {

constexpr int64_t kWinogradTile = 4;      // rows and columns of outputs
constexpr int64_t kWinogradPatch = 6;     // rows and columns of inputs that they read
constexpr int64_t kWinogradPoints = 36;   // products of a tile
constexpr int64_t kWinogradOutputs = 16;  // channels of outputs whose weights lie side by side

template <class T>
struct UpdatedConv2dArgs {
  const T* known;
  const T* input;
  const T* new_input;
  const T* addend;
  const T* new_addend;
  const T* weight;
  int64_t images;
  int64_t in_height, in_width, in_channels;
  int64_t height, width, out_channels;
  int64_t padding_top, padding_left;
  Activation activation;
  T* output;
};

// How the work is divided: by the sizes alone.
struct UpdatedConv2dWork {
  int64_t tiles;         // of all images
  int64_t chunks;        // of about equally many tiles
  int64_t groups;        // of outputs
  int64_t total;         // positions: chunks * groups
  int64_t scratch_size;  // elements
};

}  // namespace fastprune
