// ablate_conv2d on the CPU; formula and contract are in ../ablate_conv2d.h.
//
// The channels of a piece are copied to a panel [row][column][channel] that has zeros wherever a
// tap reads outside of the image, and its weights to [group of 16 outputs][tap][channel][output].
// Vectors lie along the outputs, as they do in memory. A register tile of some pixels of a row x 16
// outputs runs over taps and channels; what is left of the output is stored in the same pass that
// reads it.
#include "../ablate_conv2d.h"

#include "activation.h"
#include "vec.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

constexpr int kOutputs = 16;

template <class T>
constexpr int kVectors = kOutputs / kLanes<T>;

// Accumulators for 12 of 16 registers, or of 32, where one vector holds all outputs.
template <class T>
constexpr int kPixels = kVectors<T> >= 12 ? 1 : 12 / kVectors<T>;

// All outputs of a tile of pixels are stored one after the other as long as their weights, in
// bytes, stay near the first-level cache; those of more take several tiles for each load of a
// group's.
constexpr int64_t kFewWeights = 64 << 10;
constexpr int64_t kTilesAtOnce = 8;

struct Piece {
  int64_t first_channel, channels;
  int64_t first_tap, taps;
  // The rectangle that its taps read for the first output, and that they read for all.
  int64_t row, column;
  int64_t rows, columns;
};

template <class T>
Piece piece_of(const AblateConv2dArgs<T>& args, int64_t index) {
  const int32_t* bounds = args.pieces + 4 * index;
  Piece piece = {bounds[0], bounds[1] - bounds[0], bounds[2], bounds[3] - bounds[2], 0, 0, 0, 0};
  int64_t last_row = 0, last_column = 0;
  for (int64_t t = 0; t < piece.taps; ++t) {
    const ConvolutionTap& tap = args.taps[piece.first_tap + t];
    piece.row = t == 0 || tap.row < piece.row ? tap.row : piece.row;
    piece.column = t == 0 || tap.column < piece.column ? tap.column : piece.column;
    last_row = t == 0 || tap.row > last_row ? tap.row : last_row;
    last_column = t == 0 || tap.column > last_column ? tap.column : last_column;
  }
  piece.rows = (args.output.height - 1) * args.row_step + last_row - piece.row + 1;
  piece.columns = (args.output.width - 1) * args.column_step + last_column - piece.column + 1;
  return piece;
}

template <class T>
int64_t output_groups(const AblateConv2dArgs<T>& args) {
  return (args.output.channels + kOutputs - 1) / kOutputs;
}

// [group of outputs][tap][channel][output], zeros behind the last output.
template <class T>
void copy_weights(const AblateConv2dArgs<T>& args, const Piece& piece, T* weights) {
  for (int64_t group = 0; group < output_groups(args); ++group) {
    const int64_t left = args.output.channels - group * kOutputs;
    const T* first = args.weight.data + group * kOutputs * args.weight.output_stride;
    for (int64_t t = 0; t < piece.taps; ++t) {
      for (int64_t c = 0; c < piece.channels; ++c) {
        const T* source = first + (piece.first_channel + c) * args.weight.channel_stride +
                          (piece.first_tap + t) * args.weight.tap_stride;
        for (int64_t o = 0; o < kOutputs; ++o) {
          *weights++ = o < left ? source[o * args.weight.output_stride] : T{0};
        }
      }
    }
  }
}

// [row][column][channel] of one image.
template <class T>
void copy_pixels(const AblateConv2dArgs<T>& args, const Piece& piece, int64_t image, T* panel) {
  const ImageView<const T>& input = args.input;
  const T* source =
      input.data + image * input.image_stride + piece.first_channel * input.channel_stride;
  for (int64_t i = 0; i < piece.rows; ++i) {
    const int64_t row = piece.row + i;
    for (int64_t j = 0; j < piece.columns; ++j) {
      const int64_t column = piece.column + j;
      const bool inside = row >= 0 && row < input.height && column >= 0 && column < input.width;
      const T* pixel = source + row * input.row_stride + column * input.column_stride;
      T* target = panel + (i * piece.columns + j) * piece.channels;
      for (int64_t c = 0; c < piece.channels; ++c) {
        target[c] = inside ? pixel[c * input.channel_stride] : T{0};
      }
    }
  }
}

// What a tile of neighbouring pixels of one row works on.
template <class T>
struct Tile {
  const T* panel;    // of the first pixel, for the piece's first tap in row and column
  const T* weights;  // of the first output
  const T* output;
  T* masked;
  int64_t output_stride;  // between pixels
  int64_t outputs;        // that are left
};

// Pixels x 16 outputs. Not inlined, so that the accumulators stay in registers.
template <class T, int Pixels>
__attribute__((noinline)) void subtract_tile(const AblateConv2dArgs<T>& args, const Piece& piece,
                                             const Tile<T>& tile) {
  using V = Vec<T, kLanes<T>>;
  const int64_t step = args.column_step * piece.channels;
  V sums[Pixels][kVectors<T>] = {};
  const T* weight = tile.weights;
  for (int64_t t = 0; t < piece.taps; ++t) {
    const ConvolutionTap& tap = args.taps[piece.first_tap + t];
    const T* panel =
        tile.panel +
        ((tap.row - piece.row) * piece.columns + tap.column - piece.column) * piece.channels;
    for (int64_t c = 0; c < piece.channels; ++c) {
      V weights[kVectors<T>];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors<T>; ++v) weights[v] = load<V>(weight + v * kLanes<T>);
#pragma GCC unroll 12
      for (int n = 0; n < Pixels; ++n) {
        const V input = broadcast<V>(panel[n * step + c]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors<T>; ++v) sums[n][v] += weights[v] * input;
      }
      weight += kOutputs;
    }
  }
#pragma GCC unroll 12
  for (int n = 0; n < Pixels; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors<T>; ++v) {
      const int64_t left = tile.outputs - v * kLanes<T>;
      const V output = load_first(tile.output + n * tile.output_stride + v * kLanes<T>, left);
      store_first(tile.masked + n * args.output.channels + v * kLanes<T>,
                  activate<T, kLanes<T>>(output - sums[n][v], args.activation), left);
    }
  }
}

template <class T, int Pixels>
void subtract_some(int64_t pixels, const AblateConv2dArgs<T>& args, const Piece& piece,
                   const Tile<T>& tile) {
  if (pixels == Pixels) {
    subtract_tile<T, Pixels>(args, piece, tile);
  } else if constexpr (Pixels > 1) {
    subtract_some<T, Pixels - 1>(pixels, args, piece, tile);
  }
}

// One image of one piece.
template <class T>
void subtract_image(const AblateConv2dArgs<T>& args, const Piece& piece, int64_t image,
                    const T* weights, const T* panel, T* masked) {
  const ImageView<const T>& output = args.output;
  const T* source = output.data + image * output.image_stride;
  const int64_t groups = output_groups(args), group_size = piece.taps * piece.channels * kOutputs;
  const int64_t steps = (output.width + kPixels<T> - 1) / kPixels<T>;
  const int64_t tiles = output.height * steps;
  const bool few = groups * group_size * static_cast<int64_t>(sizeof(T)) <= kFewWeights;
  const int64_t at_once = few ? 1 : kTilesAtOnce;
  for (int64_t begin = 0; begin < tiles; begin += at_once) {
    const int64_t end = begin + at_once < tiles ? begin + at_once : tiles;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t o = group * kOutputs;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t i = tile / steps, step = tile % steps;
        // As equal as can be: a last step of one pixel would leave the units that add idle.
        const int64_t j = output.width * step / steps, next = output.width * (step + 1) / steps;
        subtract_some<T, kPixels<T>>(
            next - j, args, piece,
            {panel + (i * args.row_step * piece.columns + j * args.column_step) * piece.channels,
             weights + group * group_size,
             source + i * output.row_stride + j * output.column_stride + o,
             masked + (i * output.width + j) * output.channels + o, output.column_stride,
             output.channels - o});
      }
    }
  }
}

template <class T>
int64_t weights_size(const AblateConv2dArgs<T>& args, const Piece& piece) {
  return piece.taps * piece.channels * output_groups(args) * kOutputs;
}

}  // namespace

template <class T>
int64_t ablate_conv2d_scratch(const AblateConv2dArgs<T>& args) {
  int64_t largest = 0;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const Piece piece = piece_of(args, m);
    const int64_t size = weights_size(args, piece) + piece.rows * piece.columns * piece.channels;
    largest = size > largest ? size : largest;
  }
  return largest;
}

// Positions [begin, end) of the grid [piece][image], images innermost.
template <class T>
void ablate_conv2d(const AblateConv2dArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const int64_t images = args.output.images;
  const int64_t size = args.output.height * args.output.width * args.output.channels;
  for (int64_t position = begin; position < end; ++position) {
    const Piece piece = piece_of(args, position / images);
    T* const panel = scratch + weights_size(args, piece);
    if (position == begin || position % images == 0) copy_weights(args, piece, scratch);
    copy_pixels(args, piece, position % images, panel);
    subtract_image(args, piece, position % images, scratch, panel, args.masked + position * size);
  }
}

template int64_t ablate_conv2d_scratch(const AblateConv2dArgs<float>&);
template int64_t ablate_conv2d_scratch(const AblateConv2dArgs<double>&);
template void ablate_conv2d(const AblateConv2dArgs<float>&, int64_t, int64_t, float*);
template void ablate_conv2d(const AblateConv2dArgs<double>&, int64_t, int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
