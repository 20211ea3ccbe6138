// The contract is in channels_last_weight_gradient.h.
//
//                  rows: V vectors
//                +------+------+
//   column 0     | acc  | acc  |   for each output pixel of a chunk for which the block's tap
//   column 1     | acc  | acc  |   reads within the image:
//     ...        |      |      |     load the V vectors of its gradient
//   column C-1   | acc  | acc  |     for each column: acc += broadcast(what the tap reads) *
//   vectors
//                +------+------+
#include "channels_last_weight_gradient.h"

#include "pixel_runs.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// Pixels whose gradients and inputs, a cache line each for blocks of 16x16, stay in the first-level
// cache while all tiles of a block pass over them.
constexpr int64_t kChunkPixels = 160;
// 12 accumulators of 16 registers, and 3 for the operands; with one vector 8, as many chains of
// sums as hide the latency of a multiply-add.
template <int Vectors>
constexpr int kTileColumns = Vectors == 1 || FASTPRUNE_VECTOR_BYTES == 64 ? 8 : 6;

// Where a tap reads for an output pixel, and the pixel's gradient.
template <class T>
struct PixelPair {
  const T* input;
  const T* gradient;
};

// The pairs of a tap in the chunk in hand.
template <class T>
struct TapPairs {
  PixelPair<T>* pairs;
  int64_t count;
  int64_t chunk;  // that they are of
};

// block[c * block_rows + r] += the sum over all pairs of input[c] * gradient[r]. kMasked: only the
// first `rows` rows exist.
// Not inlined: among its callers' variables GCC keeps accumulators in memory.
template <class T, int Vectors, bool kMasked, int Columns>
__attribute__((noinline)) void pair_tile(const PixelPair<T>* pair, const PixelPair<T>* last,
                                         int64_t channel, int64_t output, int64_t rows, T* block,
                                         int64_t block_rows) {
  using V = Vec<T, kLanes<T>>;
  V acc[Columns][Vectors] = {};
  const LaneMask<T> mask = first_lanes<T>(rows);
  for (; pair < last; ++pair) {
    const T* x = pair->input + channel;
    const T* y = pair->gradient + output;
    V gradients[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      gradients[v] = kMasked ? load_lanes<T>(mask, y) : load<V>(y + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      const V value = broadcast<V>(x[c]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[c][v] += value * gradients[v];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      T* at = block + c * block_rows + v * kLanes<T>;
      store(at, load<V>(at) + acc[c][v]);
      // Zero times an infinite input is NaN.
      for (int64_t r = rows; kMasked && r < kLanes<T>; ++r) at[r] = T{};
    }
  }
}

// All columns of a block, in tiles of nearly equal width.
template <class T, int Vectors, bool kMasked = false, int Columns = kTileColumns<Vectors>>
void pair_columns(const TapPairs<T>& tap, int64_t columns, int64_t channel, int64_t output,
                  int64_t rows, T* block, int64_t block_rows) {
  const int64_t tiles = ceil_divide(columns, Columns);
  int64_t column = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t end = (tile + 1) * columns / tiles;
    if (end - column == Columns) {
      pair_tile<T, Vectors, kMasked, Columns>(tap.pairs, tap.pairs + tap.count, channel + column,
                                              output, rows, block + column * block_rows,
                                              block_rows);
    } else if constexpr (Columns > 1) {
      pair_columns<T, Vectors, kMasked, Columns - 1>(tap, end - column, channel + column, output,
                                                     rows, block + column * block_rows, block_rows);
    }
    column = end;
  }
}

// Adds a chunk to the gradients of a block: columns from input channel `channel` on, rows from
// output channel `output` on.
template <class T>
void pair_block(const TapPairs<T>& tap, int64_t columns, int64_t rows, int64_t channel,
                int64_t output, T* block, int64_t block_rows) {
  constexpr int64_t L = kLanes<T>;
  int64_t row = 0;
  for (; row + 2 * L <= rows; row += 2 * L) {
    pair_columns<T, 2>(tap, columns, channel, output + row, L, block + row, block_rows);
  }
  if (row + L <= rows) {
    pair_columns<T, 1>(tap, columns, channel, output + row, L, block + row, block_rows);
    row += L;
  }
  if (row < rows) {
    pair_columns<T, 1, true>(tap, columns, channel, output + row, rows - row, block + row,
                             block_rows);
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The pairs of a tap for output pixels [first, last). Those for which it reads outside of the image
// are left out.
template <class T>
int64_t find_pairs(const BlockSparseConv2dWeightGradientArgs<T>& args, const ConvolutionTap& tap,
                   int64_t first, int64_t last, PixelPair<T>* pairs) {
  const auto& input = args.input;
  const auto& gradient = args.grad_output;
  int64_t count = 0;
  for_each_row(gradient.height, gradient.width, first, last,
               [&](int64_t image, int64_t row, int64_t column, int64_t length) {
                 const int64_t input_row = row * args.row_step + tap.row;
                 if (input_row < 0 || input_row >= input.height) return;
                 const InsideRun inside =
                     inside_run(tap.column, args.column_step, input.width, column, length);
                 if (inside.first == inside.last) return;
                 column += inside.first;
                 const T* x = input.data + image * input.image_stride +
                              input_row * input.row_stride +
                              (column * args.column_step + tap.column) * input.column_stride;
                 const T* y = gradient.data + image * gradient.image_stride +
                              row * gradient.row_stride + column * gradient.column_stride;
                 for (int64_t i = inside.first; i < inside.last; ++i) {
                   pairs[count++] = {x, y};
                   x += args.column_step * input.column_stride;
                   y += gradient.column_stride;
                 }
               });
  return count;
}

}  // namespace

template <class T>
bool serves_channels_last_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>& args) {
  return args.input.channel_stride == 1 && args.grad_output.channel_stride == 1 &&
         args.rows % kLanes<T> == 0;
}

template <class T>
ChannelsLastWeightGradientWork plan_channels_last_weight_gradient(
    const BlockSparseConv2dWeightGradientArgs<T>& args) {
  const auto& gradient = args.grad_output;
  ChannelsLastWeightGradientWork work;
  work.pixels = gradient.images * gradient.height * gradient.width;
  work.chunks = ceil_divide(work.pixels, kChunkPixels);
  work.total = args.crow_indices[args.block_rows];
  const int64_t bytes = args.num_taps * (sizeof(TapPairs<T>) + kChunkPixels * sizeof(PixelPair<T>));
  work.scratch_size = ceil_divide(bytes, sizeof(T));
  return work;
}

template <class T>
void channels_last_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>& args,
                                   const ChannelsLastWeightGradientWork& work, int64_t begin,
                                   int64_t end, T* scratch) {
  auto* pairs = reinterpret_cast<PixelPair<T>*>(scratch);
  auto* taps = reinterpret_cast<TapPairs<T>*>(pairs + args.num_taps * kChunkPixels);
  for (int64_t t = 0; t < args.num_taps; ++t) taps[t] = {pairs + t * kChunkPixels, 0, -1};
  const int64_t block_size = args.rows * args.cols;
  for (int64_t i = begin * block_size; i < end * block_size; ++i) args.grad_values[i] = T{};
  const int64_t group_channels = args.input.channels / args.groups;
  const int64_t group_outputs = args.grad_output.channels / args.groups;
  const int64_t rows_per_group = args.block_rows / args.groups;
  for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
    const int64_t first = chunk * work.pixels / work.chunks;
    const int64_t last = (chunk + 1) * work.pixels / work.chunks;
    int64_t block_row = 0;
    for (int64_t k = begin; k < end; ++k) {
      while (args.crow_indices[block_row + 1] <= k) ++block_row;
      const int64_t t = args.col_indices[k] / args.channel_blocks;
      TapPairs<T>& tap = taps[t];
      if (tap.chunk != chunk) {
        tap.count = find_pairs(args, args.taps[t], first, last, tap.pairs);
        tap.chunk = chunk;
      }
      const int64_t group = block_row / rows_per_group;
      const int64_t channel = (args.col_indices[k] - t * args.channel_blocks) * args.cols;
      const int64_t output = block_row % rows_per_group * args.rows;
      pair_block(tap, smaller(args.cols, group_channels - channel),
                 smaller(args.rows, group_outputs - output), group * group_channels + channel,
                 group * group_outputs + output, args.grad_values + k * block_size, args.rows);
    }
  }
}

#define FASTPRUNE_INSTANTIATE(T)                                                              \
  template bool serves_channels_last_weight_gradient(                                         \
      const BlockSparseConv2dWeightGradientArgs<T>&);                                         \
  template ChannelsLastWeightGradientWork plan_channels_last_weight_gradient(                 \
      const BlockSparseConv2dWeightGradientArgs<T>&);                                         \
  template void channels_last_weight_gradient(const BlockSparseConv2dWeightGradientArgs<T>&,  \
                                              const ChannelsLastWeightGradientWork&, int64_t, \
                                              int64_t, T*);

FASTPRUNE_INSTANTIATE(float)
FASTPRUNE_INSTANTIATE(double)
#undef FASTPRUNE_INSTANTIATE

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
