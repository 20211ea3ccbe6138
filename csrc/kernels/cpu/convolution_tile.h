// The register tile of block_convolution: A outputs x V vectors of positions on the padded grid,
// across all entries of a list.
//
//                 positions: V vectors
//               +------+------+------+
//   output 0    | acc  | acc  | acc  |   for each entry, for each of its steps b:
//   output 1    | acc  | acc  | acc  |     load V vectors of the source's channel, at the tap's
//     ...       |      |      |      |       distance
//   output A-1  | acc  | acc  | acc  |     for each output: acc += broadcast(block[a][b]) * vectors
//               +------+------+------+
#pragma once

#include "activation.h"
#include "block_convolution.h"
#include "vec.h"

namespace fastprune {
namespace {

constexpr int kTileVectors = 3;
// Accumulators fill 24 of 32 registers (AVX-512) or 12 of 16; with one vector, eight chains of sums
// hide the latency of a multiply-add.
template <int Vectors>
constexpr int kTileOutputs = Vectors == 1 || FASTPRUNE_VECTOR_BYTES == 64 ? 8 : 4;

// One entry of a list: where its block's weights lie, and its source from a position on.
template <class T>
struct TileEntry {
  const T* weights;
  int64_t offset;
  int64_t steps;  // fewer than the block's where the channels end within it
};

// The vectors of a tile: the first one's position in the panel, and the others' distances from it.
struct TileVectors {
  int64_t first;
  int64_t distance[kTileVectors];
};

// A list as the tiles read it.
template <class T>
struct TileList {
  const TileEntry<T>* entries;
  int64_t count;
  int64_t output_stride;  // between the weights of neighbouring outputs
  int64_t step_stride;    // and of neighbouring steps
};

// Adds entries of a list to outputs [output, output + Outputs), in rows of `result` that hold what
// the entries before these gave; with kFirst there are none.
// Not inlined: among its callers' variables GCC keeps accumulators in memory.
// kUnitStride: output_stride == 1, known to the compiler.
template <class T, bool kUnitStride, bool kFirst, int Outputs, int Vectors>
__attribute__((noinline)) void convolution_tile(const TileList<T>& list, int64_t output,
                                                const T* panel, int64_t plane,
                                                const TileVectors& vectors, T* result,
                                                int64_t result_stride) {
  using V = Vec<T, kLanes<T>>;
  const int64_t output_stride = kUnitStride ? 1 : list.output_stride;
  const int64_t step_stride = list.step_stride;
  V acc[Outputs][Vectors] = {};
  if constexpr (!kFirst) {
#pragma GCC unroll 8
    for (int a = 0; a < Outputs; ++a) {
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) {
        acc[a][v] = load<V>(result + a * result_stride + v * kLanes<T>);
      }
    }
  }
  int64_t distance[Vectors];
  for (int v = 0; v < Vectors; ++v) distance[v] = vectors.distance[v];
  panel += vectors.first;
  const TileEntry<T>* const last = list.entries + list.count;
  for (const TileEntry<T>* entry = list.entries; entry < last; ++entry) {
    const T* w = entry->weights + output * output_stride;
    const T* x = panel + entry->offset;
    if constexpr (!kUnitStride) {
      // The next block lies anywhere: its first lines are fetched meanwhile.
      const T* lines = (entry + 1 < last ? entry + 1 : entry)->weights + output * output_stride;
#pragma GCC unroll 8
      for (int a = 0; a < Outputs; ++a) __builtin_prefetch(lines + a * output_stride);
    }
    for (int64_t b = entry->steps; b > 0; --b, w += step_stride, x += plane) {
      if constexpr (kUnitStride) __builtin_prefetch(w + 32 * step_stride);
      V inputs[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) inputs[v] = load<V>(x + distance[v]);
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

// The same for outputs [output, end), in ever lower tiles: any number of outputs is covered.
template <class T, bool kUnitStride, bool kFirst, int Vectors, int Outputs = kTileOutputs<Vectors>>
void convolve_list(const TileList<T>& list, int64_t output, int64_t end, const T* panel,
                   int64_t plane, const TileVectors& vectors, T* result, int64_t result_stride) {
  for (; output + Outputs <= end; output += Outputs, result += Outputs * result_stride) {
    convolution_tile<T, kUnitStride, kFirst, Outputs, Vectors>(list, output, panel, plane, vectors,
                                                               result, result_stride);
  }
  if constexpr (Outputs > 1) {
    if (output < end) {
      convolve_list<T, kUnitStride, kFirst, Vectors, Outputs / 2>(list, output, end, panel, plane,
                                                                  vectors, result, result_stride);
    }
  }
}

// Adds the bias to `outputs` rows of `count` elements, and applies the activation.
template <class T>
void finish_rows(const T* bias, Activation activation, int64_t outputs, int64_t count, T* rows,
                 int64_t row_stride) {
  using V = Vec<T, kLanes<T>>;
  if (bias == nullptr && activation == Activation::kNone) return;
  for (int64_t a = 0; a < outputs; ++a, rows += row_stride) {
    const V row_bias = broadcast<V>(bias ? bias[a] : T{});
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      store(rows + i, activate<T, kLanes<T>>(load<V>(rows + i) + row_bias, activation));
    }
  }
}

// dst[i] = src[i] for i < count, the last elements by a vector that overlaps the one before.
template <class T, int L = kLanes<T>>
void copy_exactly(const T* src, int64_t count, T* dst) {
  if constexpr (L == 1) {
    if (count > 0) dst[0] = src[0];
  } else {
    using V = Vec<T, L>;
    if (count < L) return copy_exactly<T, L / 2>(src, count, dst);
    for (int64_t i = 0; i + L <= count; i += L) store(dst + i, load<V>(src + i));
    store(dst + count - L, load<V>(src + count - L));
  }
}

}  // namespace
}  // namespace fastprune
