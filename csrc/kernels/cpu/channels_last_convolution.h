// The convolution of block_convolution.h with vectors along the outputs of a list, for images in
// channels-last format: nothing is copied. A list's outputs fill whole vectors
// (weight.outputs is a multiple of the lanes), and input.channel_stride and output.channel_stride
// are 1. The sums, and with them the bits, are those of block_convolution.
#pragma once

#include "block_convolution.h"

namespace fastprune {

// How the work is cut. Output pixels are numbered image by image, row by row, and cut into tiles
// of a few, of any rows: the first `larger_tiles` have one more than the others. A unit is a tile;
// units form groups whose inputs stay in the second-level cache, and the grid of (group, list) is
// walked group by group.
struct ChannelsLastWork {
  int64_t vectors;  // of outputs in a tile
  int64_t pixels;
  int64_t tiles;
  int64_t tile_pixels;  // of the tiles from larger_tiles on
  int64_t larger_tiles;
  int64_t groups;        // group g has tiles [g * tiles / groups, (g + 1) * tiles / groups)
  int64_t total;         // positions of the grid: tiles * (entries + lists)
  int64_t group_pixels;  // of the largest group
  int64_t entries;       // of the longest list
  bool stream_output;    // past the caches
  int64_t tables_size;   // bytes of the tables of entries and pixels
  int64_t scratch_size;  // elements that each thread needs, aligned to 64 bytes
};

}  // namespace fastprune
