// The weight gradient of block_sparse_conv2d. Vectors run along the padded grid of output positions
// (padded_panel.h), in copies of both operands: a register tile of columns x rows holds a vector of
// partial sums for each of its elements, over all images of a chunk, and adds their lanes at the
// end. Where the grid has no output, the gradient's copy holds zeros.
#include "../block_sparse_conv2d_weight_gradient.h"

#include "padded_panel.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kColumns = 4;  // 16 accumulators of 32 registers, and 8 for the operands
#else
constexpr int kColumns = 3;  // 12 of 16, and 4
#endif
constexpr int kRows = 4;
// Rows and columns of a block whose sums are kept together, and the vectors of positions that all
// of their tiles take one after the other: both stay in the first-level cache.
constexpr int64_t kSide = 16;
constexpr int64_t kChunkVectors = 96;
static_assert(kSide % kRows == 0);
constexpr int64_t kTileSums = kColumns * kRows;

// What the tiles of one block read, from its first image's first position on.
template <class T>
struct Operand {
  const T* data;
  int64_t image_stride;
  int64_t channel_stride;
};

// Vectors [first_vector, last_vector) of images [first_image, last_image).
struct Chunk {
  int64_t first_image, last_image;
  int64_t first_vector, last_vector;
};

// sums[c * kRows + r], a vector each, += the products of column `column` + c and row `row` + r;
// those past the last are computed from the last.
template <class T>
__attribute__((noinline)) void gradient_tile(const Operand<T>& input, const Operand<T>& gradient,
                                             int64_t column, int64_t columns, int64_t row,
                                             int64_t rows, const Chunk& chunk, T* sums) {
  using V = Vec<T, kLanes<T>>;
  V acc[kColumns][kRows];
  const T *x[kColumns], *y[kRows];
  for (int c = 0; c < kColumns; ++c) {
    const int64_t channel = column + c < columns ? column + c : columns - 1;
    x[c] = input.data + chunk.first_image * input.image_stride + channel * input.channel_stride;
    for (int r = 0; r < kRows; ++r) acc[c][r] = load<V>(sums + (c * kRows + r) * kLanes<T>);
  }
  for (int r = 0; r < kRows; ++r) {
    const int64_t channel = row + r < rows ? row + r : rows - 1;
    y[r] = gradient.data + chunk.first_image * gradient.image_stride +
           channel * gradient.channel_stride;
  }
  for (int64_t n = chunk.first_image; n < chunk.last_image; ++n) {
    for (int64_t v = chunk.first_vector; v < chunk.last_vector; ++v) {
      const int64_t at = v * kLanes<T>;
      V inputs[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) inputs[c] = load<V>(x[c] + at);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V value = load<V>(y[r] + at);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) acc[c][r] += inputs[c] * value;
      }
    }
    for (int c = 0; c < kColumns; ++c) x[c] += input.image_stride;
    for (int r = 0; r < kRows; ++r) y[r] += gradient.image_stride;
  }
  for (int c = 0; c < kColumns; ++c) {
    for (int r = 0; r < kRows; ++r) store(sums + (c * kRows + r) * kLanes<T>, acc[c][r]);
  }
}

// totals[i] = the sum of the lanes of vector i of a tile.
template <class T>
void add_lanes(const T* sums, T* totals) {
  alignas(64) T by_lane[kTileSums * kLanes<T>];
  transpose(sums, kLanes<T>, kTileSums, kLanes<T>, by_lane, kTileSums);
  for (int64_t i = 0; i < kTileSums; ++i) totals[i] = by_lane[i];
  for (int lane = 1; lane < kLanes<T>; ++lane) {
    for (int64_t i = 0; i < kTileSums; ++i) totals[i] += by_lane[lane * kTileSums + i];
  }
}

// The gradients of up to kSide columns and rows of a block, into block[c * block_rows + r].
template <class T>
void part_gradient(const Operand<T>& input, const Operand<T>& gradient, int64_t columns,
                   int64_t rows, int64_t images, int64_t vectors, T* block, int64_t block_rows) {
  constexpr int64_t kTiles = kSide / kRows * ((kSide + kColumns - 1) / kColumns);
  alignas(64) T sums[kTiles * kTileSums * kLanes<T>] = {};
  const auto for_each_tile = [&](const auto& tile) {
    T* tile_sums = sums;
    for (int64_t row = 0; row < rows; row += kRows) {
      for (int64_t column = 0; column < columns; column += kColumns) {
        tile(column, row, tile_sums);
        tile_sums += kTileSums * kLanes<T>;
      }
    }
  };
  const int64_t images_at_once = vectors < kChunkVectors ? kChunkVectors / vectors : 1;
  for (int64_t n = 0; n < images; n += images_at_once) {
    const int64_t last_image = n + images_at_once < images ? n + images_at_once : images;
    for (int64_t v = 0; v < vectors; v += kChunkVectors) {
      const Chunk chunk = {n, last_image, v,
                           v + kChunkVectors < vectors ? v + kChunkVectors : vectors};
      for_each_tile([&](int64_t column, int64_t row, T* tile_sums) {
        gradient_tile(input, gradient, column, columns, row, rows, chunk, tile_sums);
      });
    }
  }
  for_each_tile([&](int64_t column, int64_t row, const T* tile_sums) {
    T totals[kTileSums];
    add_lanes(tile_sums, totals);
    for (int64_t c = 0; c < kColumns && column + c < columns; ++c) {
      for (int64_t r = 0; r < kRows && row + r < rows; ++r) {
        block[(column + c) * block_rows + row + r] = totals[c * kRows + r];
      }
    }
  });
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
TapGrid grid_of(const BlockSparseConv2dWeightGradientArgs<T>& args, int64_t pitch, int64_t rows) {
  return {args.taps,
          args.num_taps,
          args.row_step,
          args.column_step,
          args.input.height,
          args.input.width,
          args.grad_output.height,
          args.grad_output.width,
          /*images=*/1,
          pitch,
          rows};
}

template <class T>
ImageView<const T> one_image(const ImageView<const T>& images, int64_t image) {
  ImageView<const T> result = images;
  result.data += image * images.image_stride;
  result.images = 1;
  return result;
}

}  // namespace

template <class T>
BlockSparseConv2dWeightGradientWork plan_block_sparse_conv2d_weight_gradient(
    const BlockSparseConv2dWeightGradientArgs<T>& args) {
  TapGrid grid = grid_of(args, 0, 0);
  pad_grid(grid);
  BlockSparseConv2dWeightGradientWork work;
  work.pitch = grid.pitch;
  work.rows = grid.rows;
  const int64_t positions = (grid.output_height - 1) * grid.pitch + grid.output_width;
  work.vectors = ceil_divide(positions, kLanes<T>);
  work.total = args.crow_indices[args.block_rows];
  work.input_channels = count_phases(grid, grid.num_taps) * args.input.channels;
  const Reach reach = reach_of(grid);
  work.before = reach.before;
  // Room for a vector that is written past the end.
  work.output_plane = (work.vectors + 1) * kLanes<T>;
  work.input_plane =
      ceil_divide(reach.before + reach.after, kLanes<T>) * kLanes<T> + work.output_plane;
  work.image_size =
      work.input_channels * work.input_plane + args.grad_output.channels * work.output_plane;
  return work;
}

template <class T>
void copy_conv2d_planes(const BlockSparseConv2dWeightGradientArgs<T>& args,
                        const BlockSparseConv2dWeightGradientWork& work, int64_t begin, int64_t end,
                        T* planes) {
  const TapGrid grid = grid_of(args, work.pitch, work.rows);
  TapGrid output_grid = grid;
  output_grid.row_step = output_grid.column_step = 1;
  for (int64_t image = begin; image < end; ++image) {
    T* target = planes + image * work.image_size;
    fill_panel(grid, one_image(args.input, image), -work.before, work.input_plane - kLanes<T>,
               target, work.input_plane);
    fill_phase(output_grid, one_image(args.grad_output, image), /*phase=*/0, 0,
               work.output_plane - kLanes<T>, target + work.input_channels * work.input_plane,
               work.output_plane);
  }
}

template <class T>
void block_sparse_conv2d_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>& args,
                                         const BlockSparseConv2dWeightGradientWork& work,
                                         const T* planes, int64_t begin, int64_t end) {
  const TapGrid grid = grid_of(args, work.pitch, work.rows);
  const Operand<T> input = {planes + work.before, work.image_size, work.input_plane};
  const Operand<T> gradient = {planes + work.input_channels * work.input_plane, work.image_size,
                               work.output_plane};
  const int64_t group_channels = args.input.channels / args.groups;
  const int64_t group_outputs = args.grad_output.channels / args.groups;
  const int64_t rows_per_group = args.block_rows / args.groups;
  int64_t block_row = 0;
  for (int64_t k = begin; k < end; ++k) {
    while (args.crow_indices[block_row + 1] <= k) ++block_row;
    T* block = args.grad_values + k * args.rows * args.cols;
    for (int64_t i = 0; i < args.rows * args.cols; ++i) block[i] = T{};
    const int64_t tap = args.col_indices[k] / args.channel_blocks;
    if (!tap_reads(grid, args.taps[tap])) continue;
    const int64_t group = block_row / rows_per_group;
    const int64_t channel = args.col_indices[k] % args.channel_blocks * args.cols;
    const int64_t output = block_row % rows_per_group * args.rows;
    const int64_t columns = smaller(args.cols, group_channels - channel);
    const int64_t rows = smaller(args.rows, group_outputs - output);
    const int64_t input_channel =
        phase_rank(grid, tap) * args.input.channels + group * group_channels + channel;
    for (int64_t row = 0; row < rows; row += kSide) {
      for (int64_t column = 0; column < columns; column += kSide) {
        Operand<T> x = input, y = gradient;
        x.data += tap_shift(grid, args.taps[tap]) + (input_channel + column) * x.channel_stride;
        y.data += (group * group_outputs + output + row) * y.channel_stride;
        part_gradient(x, y, smaller(columns - column, kSide), smaller(rows - row, kSide),
                      args.input.images, work.vectors, block + column * args.rows + row, args.rows);
      }
    }
  }
}

#define FASTPRUNE_INSTANTIATE(T)                                                                   \
  template BlockSparseConv2dWeightGradientWork plan_block_sparse_conv2d_weight_gradient(           \
      const BlockSparseConv2dWeightGradientArgs<T>&);                                              \
  template void copy_conv2d_planes(const BlockSparseConv2dWeightGradientArgs<T>&,                  \
                                   const BlockSparseConv2dWeightGradientWork&, int64_t, int64_t,   \
                                   T*);                                                            \
  template void block_sparse_conv2d_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>&, \
                                                    const BlockSparseConv2dWeightGradientWork&,    \
                                                    const T*, int64_t, int64_t);

FASTPRUNE_INSTANTIATE(float)
FASTPRUNE_INSTANTIATE(double)
#undef FASTPRUNE_INSTANTIATE

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
