// The weight gradient of block_sparse_conv2d. Vectors run along the grid of output positions
// (convolution_grid.h), in both operands, so that neither is transposed: a register tile of columns
// x rows holds a vector of partial sums for each of its elements, over all images of a chunk, and
// adds their lanes at the end.
#include "../block_sparse_conv2d_weight_gradient.h"

#include "convolution_planes.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kColumns = 4;  // 16 accumulators of 32 registers, and 8 for the operands
#else
constexpr int kColumns = 2;  // 8 of 16, and 6
#endif
constexpr int kRows = 4;
// Vectors of a chunk: adding up the lanes of a tile costs as much as ten of them.
constexpr int64_t kChunkVectors = 128;

// What the tiles of one block read: plane pointers of its first image, and the masks of its tap.
template <class T>
struct Operand {
  const T* data;
  int64_t image_stride;
  int64_t channel_stride;
  const LaneMask<T>* lanes;
};

// sums[c * kRows + r] = the product of column `column` + c and row `row` + r; those past the last
// are computed from the last.
template <class T>
__attribute__((noinline)) void gradient_tile(const Operand<T>& input, const Operand<T>& gradient,
                                             int64_t column, int64_t columns, int64_t row,
                                             int64_t rows, int64_t images, int64_t vectors,
                                             T* sums) {
  using V = Vec<T, kLanes<T>>;
  constexpr int kCount = kColumns * kRows;
  V acc[kColumns][kRows] = {};
  const T *x[kColumns], *y[kRows];
  for (int c = 0; c < kColumns; ++c) {
    const int64_t channel = column + c < columns ? column + c : columns - 1;
    x[c] = input.data + channel * input.channel_stride;
  }
  for (int r = 0; r < kRows; ++r) {
    const int64_t channel = row + r < rows ? row + r : rows - 1;
    y[r] = gradient.data + channel * gradient.channel_stride;
  }
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = v * kLanes<T>;
      const LaneMask<T> x_lanes = input.lanes[v], y_lanes = gradient.lanes[v];
      V inputs[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) inputs[c] = load_lanes<T>(x_lanes, x[c] + at);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V value = load_lanes<T>(y_lanes, y[r] + at);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) acc[c][r] += inputs[c] * value;
      }
    }
    for (int c = 0; c < kColumns; ++c) x[c] += input.image_stride;
    for (int r = 0; r < kRows; ++r) y[r] += gradient.image_stride;
  }
  alignas(64) T lanes[kCount * kLanes<T>], by_lane[kCount * kLanes<T>];
  for (int c = 0; c < kColumns; ++c) {
    for (int r = 0; r < kRows; ++r) store(lanes + (c * kRows + r) * kLanes<T>, acc[c][r]);
  }
  transpose(lanes, kLanes<T>, kCount, kLanes<T>, by_lane, kCount);
  for (int i = 0; i < kCount; ++i) sums[i] = by_lane[i];
  for (int lane = 1; lane < kLanes<T>; ++lane) {
    for (int i = 0; i < kCount; ++i) sums[i] += by_lane[lane * kCount + i];
  }
}

template <class T>
bool reads_in_place(const BlockSparseConv2dWeightGradientArgs<T>& args) {
  return args.row_step == 1 && args.column_step == 1 && args.input.column_stride == 1 &&
         args.grad_output.column_stride == 1 &&
         args.input.row_stride == args.grad_output.row_stride &&
         args.input.row_stride >= args.input.width &&
         args.input.row_stride >= args.grad_output.width;
}

template <class T>
TapGrid grid_of(const BlockSparseConv2dWeightGradientArgs<T>& args,
                const BlockSparseConv2dWeightGradientWork& work) {
  return {args.taps,
          args.num_taps,
          args.row_step,
          args.column_step,
          args.input.height,
          args.input.width,
          args.grad_output.height,
          args.grad_output.width,
          /*images=*/1,
          work.pitch,
          work.rows};
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
  const int64_t input_rows = ceil_divide(args.input.height, args.row_step);
  const int64_t input_columns = ceil_divide(args.input.width, args.column_step);
  const int64_t output_rows = args.grad_output.height, output_columns = args.grad_output.width;
  BlockSparseConv2dWeightGradientWork work;
  work.in_place = reads_in_place(args);
  work.pitch = work.in_place                    ? args.input.row_stride
               : input_columns > output_columns ? input_columns
                                                : output_columns;
  work.rows = input_rows > output_rows ? input_rows : output_rows;
  work.vectors = ceil_divide((output_rows - 1) * work.pitch + output_columns, kLanes<T>);
  work.chunk = ceil_divide(kChunkVectors, work.vectors);
  work.total = args.crow_indices[args.block_rows];
  const int64_t bytes = (args.num_taps + 1) * work.vectors * sizeof(LaneMask<T>);
  work.scratch_size = ceil_divide(bytes, 64) * 64 / static_cast<int64_t>(sizeof(T));
  const TapGrid grid = grid_of(args, work);
  work.input_channels = count_phases(grid, grid.num_taps) * args.input.channels;
  return work;
}

template <class T>
void copy_conv2d_planes(const BlockSparseConv2dWeightGradientArgs<T>& args,
                        const BlockSparseConv2dWeightGradientWork& work, int64_t begin, int64_t end,
                        T* planes) {
  const TapGrid grid = grid_of(args, work);
  TapGrid output_grid = grid;
  output_grid.row_step = output_grid.column_step = 1;
  const int64_t plane = work.rows * work.pitch;
  for (int64_t image = begin; image < end; ++image) {
    T* target = planes + image * (work.input_channels + args.grad_output.channels) * plane;
    copy_phases(grid, one_image(args.input, image), 0, plane, target, plane);
    copy_phase(output_grid, one_image(args.grad_output, image), /*phase=*/0, 0, plane,
               target + work.input_channels * plane, plane);
  }
}

template <class T>
void block_sparse_conv2d_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>& args,
                                         const BlockSparseConv2dWeightGradientWork& work,
                                         const T* planes, int64_t begin, int64_t end, T* scratch) {
  const TapGrid grid = grid_of(args, work);
  const int64_t plane = work.rows * work.pitch;
  const int64_t image_size = (work.input_channels + args.grad_output.channels) * plane;
  Operand<T> input = {args.input.data, args.input.image_stride, args.input.channel_stride, nullptr};
  Operand<T> gradient = {args.grad_output.data, args.grad_output.image_stride,
                         args.grad_output.channel_stride, nullptr};
  if (!work.in_place) {
    input = {planes, image_size, plane, nullptr};
    gradient = {planes + work.input_channels * plane, image_size, plane, nullptr};
  }
  auto* lanes = reinterpret_cast<LaneMask<T>*>(scratch);
  for (int64_t v = 0; v < work.vectors; ++v) {
    const LanePositions<T> positions(grid, v);
    for (int64_t t = 0; t < args.num_taps; ++t) {
      lanes[t * work.vectors + v] = lane_mask<T>(positions.inside(args.taps[t]));
    }
    lanes[args.num_taps * work.vectors + v] = lane_mask<T>(positions.outputs());
  }
  gradient.lanes = lanes + args.num_taps * work.vectors;

  const int64_t group_channels = args.input.channels / args.groups;
  const int64_t group_outputs = args.grad_output.channels / args.groups;
  const int64_t rows_per_group = args.block_rows / args.groups;
  for (int64_t first = 0; first < args.input.images; first += work.chunk) {
    const int64_t images =
        first + work.chunk < args.input.images ? work.chunk : args.input.images - first;
    int64_t block_row = 0;
    for (int64_t k = begin; k < end; ++k) {
      while (args.crow_indices[block_row + 1] <= k) ++block_row;
      const int64_t group = block_row / rows_per_group;
      const int64_t tap = args.col_indices[k] / args.channel_blocks;
      const int64_t channel = args.col_indices[k] % args.channel_blocks * args.cols;
      const int64_t output = block_row % rows_per_group * args.rows;
      const int64_t columns =
          args.cols < group_channels - channel ? args.cols : group_channels - channel;
      const int64_t rows = args.rows < group_outputs - output ? args.rows : group_outputs - output;
      const int64_t phase = work.in_place ? 0 : phase_rank(grid, tap) * args.input.channels * plane;
      Operand<T> x = input, y = gradient;
      x.data += first * x.image_stride + phase + tap_shift(grid, args.taps[tap]) +
                (group * group_channels + channel) * x.channel_stride;
      x.lanes = lanes + tap * work.vectors;
      y.data += first * y.image_stride + (group * group_outputs + output) * y.channel_stride;
      T* block = args.grad_values + k * args.rows * args.cols;
      if (first == 0) {
        for (int64_t i = 0; i < args.rows * args.cols; ++i) block[i] = T{};
      }
      for (int64_t row = 0; row < rows; row += kRows) {
        for (int64_t column = 0; column < columns; column += kColumns) {
          T sums[kColumns * kRows];
          gradient_tile(x, y, column, columns, row, rows, images, work.vectors, sums);
          for (int c = 0; c < kColumns && column + c < columns; ++c) {
            for (int r = 0; r < kRows && row + r < rows; ++r) {
              block[(column + c) * args.rows + row + r] += sums[c * kRows + r];
            }
          }
        }
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
                                                    const T*, int64_t, int64_t, T*);

FASTPRUNE_INSTANTIATE(float)
FASTPRUNE_INSTANTIATE(double)
#undef FASTPRUNE_INSTANTIATE

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
