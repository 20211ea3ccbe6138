// The convolution that block_sparse_conv2d's forward and its input gradient share on the CPU:
//
//   output[n, list p's output a, i, j] = activation(bias + sum over entries e of list p, steps b:
//     input[n, source_e * steps + b, i * row_step + row_t, j * column_step + column_t] *
//     block_e[a][b])
//
// with tap t and source block source_e of entry e from sources[e] = t * sources_per_tap + source_e,
// both counted within the list's group.
//
// Forward: a list is a block row, a source is a block of input channels. Input gradient: a list is
// a block of input channels, a source is a block row, the input is the gradient of the output, and
// the taps read in the opposite direction.
//
// Sums accumulate in T, in the order of the entries, one fused multiply-add for each step
// (baseline: a product and an addition), then the bias is added: the bits depend neither on the
// number of threads nor on the other images nor on the memory format, and are those of
// block_product.
#pragma once

#include "../block_sparse_conv2d.h"
#include "block_product.h"

namespace fastprune {

template <class T>
struct BlockConvolutionArgs {
  ImageView<const T> input;
  BlockLists<T> weight;
  int64_t sources_per_tap;  // ceil(input.channels / groups / weight.steps)
  int64_t groups;           // of channels; each has as many lists
  const ConvolutionTap* taps;
  int64_t num_taps;
  int64_t row_step;  // between the inputs of neighbouring outputs
  int64_t column_step;
  const T* bias;        // [output.channels] or null
  ImageView<T> output;  // may be a strided part of an image
  Activation activation;
};

// How the work is cut. Positions are numbered along a grid of `pitch` columns, `rows` rows for each
// image, so wide that a tap is one distance for all outputs (padded_panel.h). The outputs are cut
// into vectors of neighbouring positions, in runs: rows of an image, or images whose vectors run on
// across rows, or all images; whichever takes fewest. A unit is a vector; units form groups, each
// with a panel of the inputs that it reads, and the grid of (group, list) is walked group by group.
struct BlockConvolutionWork {
  int64_t pitch;
  int64_t rows;
  int64_t vectors;         // of all runs
  int64_t run_vectors;     // of one run
  int64_t run_positions;   // from a run's first output to its last
  int64_t runs_per_image;  // 0: one run for all images
  int64_t groups;          // group g has vectors [g * vectors / groups, (g + 1) * vectors / groups)
  int64_t total;           // positions of the grid: vectors * (entries + lists)
  int64_t before;          // positions that a panel holds before its group's first,
  int64_t after;           // and after its last
  int64_t plane;           // elements of one channel of a panel
  int64_t panel_size;
  int64_t tables_size;   // bytes of the tables of entries, tiles and stores
  int64_t scratch_size;  // elements that each thread needs, aligned to 64 bytes
};

}  // namespace fastprune
