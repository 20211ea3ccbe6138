// updated_conv2d on the CPU; formula and contract are in ../updated_conv2d.h.
//
// Vectors lie along the channels, which lie side by side in memory. A chunk of tiles is
// transformed to one plane [tile][channel] for each of the 36 points; a register tile of some tiles
// x 16 outputs runs over the channels; the products of a group of outputs are transformed back,
// added to what is known and stored. Planes of inputs and products of a chunk share the
// second-level cache.
#include "../updated_conv2d.h"

#include "activation.h"
#include "vec.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// Outputs whose products are held at once: a plane of inputs is read once for all of them.
constexpr int64_t kGroup = 64;

// Bytes of a chunk's transformed inputs, and the least tiles of a chunk: with fewer the weights,
// which all chunks read, are not used often enough for each load.
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kLeastTiles = 36;

// Planes begin at different cache sets.
constexpr int64_t kPlanePadding = 16;

template <class T>
constexpr int kVectors = static_cast<int>(kWinogradOutputs) / kLanes<T>;

// Accumulators for 12 of 16 registers, or of 32, where one vector holds all outputs.
template <class T>
constexpr int kTiles = kVectors<T> >= 12 ? 1 : 12 / kVectors<T>;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
int64_t padded_channels(const UpdatedConv2dArgs<T>& args) {
  return ceil_divide(args.in_channels, kLanes<T>) * kLanes<T>;
}

struct Planes {
  int64_t tiles;          // of the largest chunk
  int64_t input_stride;   // between the channels of two tiles
  int64_t input_plane;    // between two points
  int64_t product_plane;  // between two points
};

template <class T>
Planes planes_of(const UpdatedConv2dArgs<T>& args, const UpdatedConv2dWork& work) {
  const int64_t tiles = work.chunks > 0 ? ceil_divide(work.tiles, work.chunks) : 0;
  const int64_t channels = padded_channels(args);
  return {tiles, channels, tiles * channels + kPlanePadding, tiles * kGroup + kPlanePadding};
}

// B^T d of the paper.
template <class V>
inline void transform_input(const V (&d)[6], V (&result)[6]) {
  const V even = d[4] - d[2] * 4, odd = d[3] - d[1] * 4;
  const V near = d[4] - d[2], far = (d[3] - d[1]) * 2;
  result[0] = d[0] * 4 - d[2] * 5 + d[4];
  result[1] = even + odd;
  result[2] = even - odd;
  result[3] = near + far;
  result[4] = near - far;
  result[5] = d[1] * 4 - d[3] * 5 + d[5];
}

// A^T m of the paper.
template <class V>
inline void transform_output(const V (&m)[6], V (&result)[4]) {
  const V sum = m[1] + m[2], difference = m[1] - m[2];
  const V wide_sum = m[3] + m[4], wide_difference = m[3] - m[4];
  result[0] = m[0] + sum + wide_sum;
  result[1] = difference + wide_difference * 2;
  result[2] = sum + wide_sum * 4;
  result[3] = difference + wide_difference * 8 + m[5];
}

struct TilePosition {
  int64_t image, row, column;  // of its first output
};

template <class T>
TilePosition position_of(const UpdatedConv2dArgs<T>& args, int64_t tile) {
  const int64_t columns = ceil_divide(args.width, kWinogradTile);
  const int64_t rows = ceil_divide(args.height, kWinogradTile);
  return {tile / (rows * columns), tile / columns % rows * kWinogradTile,
          tile % columns * kWinogradTile};
}

// Where the pixels of a patch lie before and after the change; `zeros` stands for those outside of
// the image.
template <class T>
struct Patch {
  const T* before[kWinogradPatch][kWinogradPatch];
  const T* after[kWinogradPatch][kWinogradPatch];

  Patch(const UpdatedConv2dArgs<T>& args, const TilePosition& tile, const T* zeros) {
    for (int64_t i = 0; i < kWinogradPatch; ++i) {
      for (int64_t j = 0; j < kWinogradPatch; ++j) {
        const int64_t row = tile.row + i - args.padding_top;
        const int64_t column = tile.column + j - args.padding_left;
        const bool inside =
            row >= 0 && row < args.in_height && column >= 0 && column < args.in_width;
        const int64_t offset =
            ((tile.image * args.in_height + row) * args.in_width + column) * args.in_channels;
        before[i][j] = inside ? args.input + offset : zeros;
        after[i][j] = inside ? args.new_input + offset : zeros;
      }
    }
  }
};

// The transformed change of one tile's inputs, to `planes`. The pixels of the next tile are fetched
// meanwhile: rows of a patch are too short and too far apart for the hardware to see them coming.
template <class T>
void transform_tile(const Patch<T>& patch, const Patch<T>& next, int64_t channels, int64_t plane,
                    T* planes) {
  using V = Vec<T, kLanes<T>>;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    const int64_t left = channels - c;
    V columns[kWinogradPatch][kWinogradPatch];
    for (int j = 0; j < kWinogradPatch; ++j) {
      V change[kWinogradPatch];
      for (int i = 0; i < kWinogradPatch; ++i) {
        if (c % kLine == 0) {
          __builtin_prefetch(next.before[i][j] + c);
          __builtin_prefetch(next.after[i][j] + c);
        }
        change[i] =
            load_first(patch.after[i][j] + c, left) - load_first(patch.before[i][j] + c, left);
      }
      transform_input(change, columns[j]);
    }
    for (int i = 0; i < kWinogradPatch; ++i) {
      V row[kWinogradPatch], result[kWinogradPatch];
      for (int j = 0; j < kWinogradPatch; ++j) row[j] = columns[j][i];
      transform_input(row, result);
      for (int j = 0; j < kWinogradPatch; ++j) {
        store(planes + (i * kWinogradPatch + j) * plane + c, result[j]);
      }
    }
  }
}

// Tiles x 16 outputs. Not inlined, so that the accumulators stay in registers.
template <class T, int Tiles>
__attribute__((noinline)) void multiply_tiles(const T* inputs, int64_t input_stride,
                                              const T* weight, int64_t channels, T* products) {
  using V = Vec<T, kLanes<T>>;
  V sums[Tiles][kVectors<T>] = {};
  for (int64_t c = 0; c < channels; ++c) {
    V weights[kVectors<T>];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors<T>; ++v) {
      weights[v] = load<V>(weight + c * kWinogradOutputs + v * kLanes<T>);
    }
#pragma GCC unroll 12
    for (int n = 0; n < Tiles; ++n) {
      const V input = broadcast<V>(inputs[n * input_stride + c]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors<T>; ++v) sums[n][v] += weights[v] * input;
    }
  }
#pragma GCC unroll 12
  for (int n = 0; n < Tiles; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors<T>; ++v) {
      store(products + n * kGroup + v * kLanes<T>, sums[n][v]);
    }
  }
}

template <class T, int Tiles>
void multiply_some(int64_t tiles, const T* inputs, int64_t input_stride, const T* weight,
                   int64_t channels, T* products) {
  if (tiles == Tiles) {
    multiply_tiles<T, Tiles>(inputs, input_stride, weight, channels, products);
  } else if constexpr (Tiles > 1) {
    multiply_some<T, Tiles - 1>(tiles, inputs, input_stride, weight, channels, products);
  }
}

// All points of a chunk for the outputs [16 * first, 16 * last).
template <class T>
void multiply_chunk(const UpdatedConv2dArgs<T>& args, const Planes& planes, int64_t tiles,
                    int64_t first, int64_t last, const T* inputs, T* products) {
  const int64_t panels = ceil_divide(args.out_channels, kWinogradOutputs);
  const int64_t steps = ceil_divide(tiles, kTiles<T>);
  for (int64_t point = 0; point < kWinogradPoints; ++point) {
    for (int64_t panel = first; panel < last; ++panel) {
      const T* weight =
          args.weight + (point * panels + panel) * args.in_channels * kWinogradOutputs;
      for (int64_t step = 0; step < steps; ++step) {
        // As equal as can be: a last step of one tile would leave the units that add idle.
        const int64_t tile = tiles * step / steps, end = tiles * (step + 1) / steps;
        multiply_some<T, kTiles<T>>(
            end - tile, inputs + point * planes.input_plane + tile * planes.input_stride,
            planes.input_stride, weight, args.in_channels,
            products + point * planes.product_plane + tile * kGroup +
                (panel - first) * kWinogradOutputs);
      }
    }
  }
}

// One tile of outputs [first, last), from their products.
template <class T>
void finish_tile(const UpdatedConv2dArgs<T>& args, const TilePosition& tile, int64_t first,
                 int64_t last, int64_t plane, const T* products) {
  using V = Vec<T, kLanes<T>>;
  const int64_t rows = args.height - tile.row, columns = args.width - tile.column;
  for (int64_t k = first; k < last; k += kLanes<T>) {
    const int64_t left = args.out_channels - k;
    V halves[kWinogradPatch][kWinogradTile];
    for (int j = 0; j < kWinogradPatch; ++j) {
      V column[kWinogradPatch];
      for (int i = 0; i < kWinogradPatch; ++i) {
        column[i] = load<V>(products + (i * kWinogradPatch + j) * plane + k - first);
      }
      transform_output(column, halves[j]);
    }
    for (int i = 0; i < kWinogradTile && i < rows; ++i) {
      V row[kWinogradPatch], change[kWinogradTile];
      for (int j = 0; j < kWinogradPatch; ++j) row[j] = halves[j][i];
      transform_output(row, change);
      const int64_t pixel = (tile.image * args.height + tile.row + i) * args.width + tile.column;
      for (int j = 0; j < kWinogradTile && j < columns; ++j) {
        const int64_t offset = (pixel + j) * args.out_channels + k;
        V value = load_first(args.known + offset, left) + change[j];
        if (args.addend != nullptr) {
          value +=
              load_first(args.new_addend + offset, left) - load_first(args.addend + offset, left);
        }
        store_first(args.output + offset, activate<T, kLanes<T>>(value, args.activation), left);
      }
    }
  }
}

}  // namespace

template <class T>
UpdatedConv2dWork plan_updated_conv2d(const UpdatedConv2dArgs<T>& args) {
  UpdatedConv2dWork work;
  work.tiles = args.images * ceil_divide(args.height, kWinogradTile) *
               ceil_divide(args.width, kWinogradTile);
  const int64_t channels = padded_channels(args);
  const int64_t bytes = kWinogradPoints * channels * static_cast<int64_t>(sizeof(T));
  const int64_t fitting = kChunkBytes / (bytes > 0 ? bytes : 1);
  work.chunks = ceil_divide(work.tiles, fitting > kLeastTiles ? fitting : kLeastTiles);
  work.groups = ceil_divide(args.out_channels, kGroup);
  work.total = work.chunks * work.groups;
  const Planes planes = planes_of(args, work);
  work.scratch_size = kWinogradPoints * (planes.input_plane + planes.product_plane) + channels;
  return work;
}

// Positions [begin, end) of the grid [chunk of tiles][group of outputs], groups innermost.
template <class T>
void updated_conv2d(const UpdatedConv2dArgs<T>& args, const UpdatedConv2dWork& work, int64_t begin,
                    int64_t end, T* scratch) {
  const Planes planes = planes_of(args, work);
  T* const inputs = scratch;
  T* const products = inputs + kWinogradPoints * planes.input_plane;
  T* const zeros = products + kWinogradPoints * planes.product_plane;
  for (int64_t c = 0; c < planes.input_stride; ++c) zeros[c] = T{0};
  int64_t transformed = -1;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t chunk = position / work.groups, group = position % work.groups;
    const int64_t first_tile = work.tiles * chunk / work.chunks;
    const int64_t tiles = work.tiles * (chunk + 1) / work.chunks - first_tile;
    if (chunk != transformed) {
      Patch<T> patch(args, position_of(args, first_tile), zeros);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t following =
            first_tile + t + 1 < work.tiles ? first_tile + t + 1 : first_tile + t;
        const Patch<T> next(args, position_of(args, following), zeros);
        transform_tile(patch, next, args.in_channels, planes.input_plane,
                       inputs + t * planes.input_stride);
        patch = next;
      }
      transformed = chunk;
    }
    const int64_t first = group * kGroup;
    const int64_t last = args.out_channels < first + kGroup ? args.out_channels : first + kGroup;
    multiply_chunk(args, planes, tiles, first / kWinogradOutputs,
                   ceil_divide(last, kWinogradOutputs), inputs, products);
    for (int64_t t = 0; t < tiles; ++t) {
      finish_tile(args, position_of(args, first_tile + t), first, last, planes.product_plane,
                  products + t * kGroup);
    }
  }
}

template UpdatedConv2dWork plan_updated_conv2d(const UpdatedConv2dArgs<float>&);
template UpdatedConv2dWork plan_updated_conv2d(const UpdatedConv2dArgs<double>&);
template void updated_conv2d(const UpdatedConv2dArgs<float>&, const UpdatedConv2dWork&, int64_t,
                             int64_t, float*);
template void updated_conv2d(const UpdatedConv2dArgs<double>&, const UpdatedConv2dWork&, int64_t,
                             int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
