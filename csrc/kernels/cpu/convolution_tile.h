// The register tile of block_convolution: A outputs x V vectors along the grid of positions,
// across all entries of a list.
//
//                 positions: V vectors
//               +------+------+------+
//   output 0    | acc  | acc  | acc  |   for each entry, for each of its steps b:
//   output 1    | acc  | acc  | acc  |     load V vectors of the source's channel, at the tap's
//     ...       |      |      |      |       distance, zeros in the lanes that lie outside
//   output A-1  | acc  | acc  | acc  |     for each output: acc += broadcast(block[a][b]) * vectors
//               +------+------+------+
//
// Loads with zeroed lanes take the place of a padded copy: the input is read where it lies.
#pragma once

#include "activation.h"
#include "block_convolution.h"
#include "convolution_grid.h"

namespace fastprune {
namespace {

#if defined(__AVX512F__)
constexpr int kTileOutputs = 8;  // 24 of 32 registers, and 4 for the inputs and the broadcast
#else
constexpr int kTileOutputs = 4;  // 12 of 16 registers, and 4
#endif

constexpr int kTileVectors = 3;

// What one tap reads for the vectors of one tile.
template <class T>
struct TileTap {
  int64_t offset;  // from the element of the tile's first position
  bool reads;      // whether any lane lies in the input
  LaneMask<T> lanes[kTileVectors];
};

// The taps of the tile of vectors [first, first + count), into result[num_taps]; offsets[t] is the
// tap's distance from a position to the element that it reads.
template <class T>
void make_tile_taps(const TapGrid& grid, const int64_t* offsets, int64_t first, int64_t count,
                    TileTap<T>* result) {
  for (int64_t t = 0; t < grid.num_taps; ++t) {
    result[t].offset = offsets[t];
    result[t].reads = false;
  }
  for (int64_t v = 0; v < count; ++v) {
    const LanePositions<T> positions(grid, first + v);
    for (int64_t t = 0; t < grid.num_taps; ++t) {
      const auto inside = positions.inside(grid.taps[t]);
      result[t].lanes[v] = lane_mask<T>(inside);
      result[t].reads |= !all_lanes(~inside);
    }
  }
}

// What the tiles of one list read.
template <class T>
struct TileSource {
  const T* data;   // the element of the tile's first position, in the group's first channel
  int64_t stride;  // between channels
  int64_t channels;
  int64_t sources_per_tap;
  const TileTap<T>* taps;
};

// Outputs [output, output + Outputs) of list `list` into rows of `result`, without the activation.
// Not inlined: among its callers' variables GCC keeps accumulators in memory.
// kUnitStride: weight.output_stride == 1, known to the compiler.
template <class T, bool kUnitStride, int Outputs, int Vectors>
__attribute__((noinline)) void convolution_tile(const BlockLists<T>& weight, int64_t list,
                                                int64_t output, const TileSource<T>& source,
                                                const T* bias, T* result, int64_t result_stride) {
  using V = Vec<T, kLanes<T>>;
  const int64_t output_stride = kUnitStride ? 1 : weight.output_stride;
  const int64_t block_size = weight.outputs * weight.steps;
  V acc[Outputs][Vectors] = {};
  if (bias) {
#pragma GCC unroll 8
    for (int a = 0; a < Outputs; ++a) {
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) acc[a][v] = broadcast<V>(bias[a]);
    }
  }
  const int64_t last = weight.offsets[list + 1];
  const auto sources_per_tap = static_cast<uint32_t>(source.sources_per_tap);
  for (int64_t j = weight.offsets[list]; j < last; ++j) {
    const auto entry = static_cast<uint32_t>(weight.sources[j]);
    const TileTap<T>& tap = source.taps[entry / sources_per_tap];
    if (!tap.reads) continue;
    const int64_t first = entry % sources_per_tap * weight.steps;
    const int64_t remaining = source.channels - first;
    const int64_t steps = weight.steps < remaining ? weight.steps : remaining;
    const int64_t block = weight.blocks ? weight.blocks[j] : j;
    const T* w = weight.values + block * block_size + output * output_stride;
    const T* x = source.data + tap.offset + first * source.stride;
    LaneMask<T> lanes[Vectors];
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) lanes[v] = tap.lanes[v];
    if constexpr (!kUnitStride) {
      // The next block lies anywhere: its first lines are fetched meanwhile.
      const int64_t next = weight.blocks && j + 1 < last ? weight.blocks[j + 1] : block;
      const T* lines = weight.values + next * block_size + output * output_stride;
#pragma GCC unroll 8
      for (int a = 0; a < Outputs; ++a) __builtin_prefetch(lines + a * output_stride);
    }
    for (int64_t b = 0; b < steps; ++b, w += weight.step_stride, x += source.stride) {
      if constexpr (kUnitStride) __builtin_prefetch(w + 32 * weight.step_stride);
      V inputs[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) inputs[v] = load_lanes<T>(lanes[v], x + v * kLanes<T>);
#pragma GCC unroll 8
      for (int a = 0; a < Outputs; ++a) {
        const V value = broadcast<V>(w[a * output_stride]);
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) acc[a][v] += value * inputs[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < Outputs; ++a) {
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) store(result + a * result_stride + v * kLanes<T>, acc[a][v]);
  }
}

// Outputs [output, end) of a list, in ever lower tiles: any number of outputs is covered.
template <class T, bool kUnitStride, int Vectors, int Outputs = kTileOutputs>
void convolve_list(const BlockLists<T>& weight, int64_t list, int64_t output, int64_t end,
                   const TileSource<T>& source, const T* bias, T* result, int64_t result_stride) {
  for (; output + Outputs <= end; output += Outputs, result += Outputs * result_stride) {
    convolution_tile<T, kUnitStride, Outputs, Vectors>(weight, list, output, source, bias, result,
                                                       result_stride);
    if (bias) bias += Outputs;
  }
  if constexpr (Outputs > 1) {
    if (output < end) {
      convolve_list<T, kUnitStride, Vectors, Outputs / 2>(weight, list, output, end, source, bias,
                                                          result, result_stride);
    }
  }
}

// Applies the activation to `outputs` rows of `count` elements.
template <class T>
void activate_rows(Activation activation, int64_t outputs, int64_t count, T* rows,
                   int64_t row_stride) {
  using V = Vec<T, kLanes<T>>;
  if (activation == Activation::kNone) return;
  for (int64_t a = 0; a < outputs; ++a, rows += row_stride) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      store(rows + i, activate<T, kLanes<T>>(load<V>(rows + i), activation));
    }
  }
}

}  // namespace
}  // namespace fastprune
