// The register tile of channels_last_convolution.h.
//
//               outputs: V vectors
//             +------+------+
//   pixel 0   | acc  | acc  |   for each entry, for each of its steps b:
//   pixel 1   | acc  | acc  |     load the V vectors of block[b]
//     ...     |      |      |     for each pixel: acc += broadcast(what its tap reads) * vectors
//   pixel P-1 | acc  | acc  |
//             +------+------+
//
// What a tap reads for a pixel is an address: pixels may lie anywhere, and outside of the image
// they lie in a row of zeros.
#pragma once

#include "activation.h"
#include "vec.h"

namespace fastprune {
namespace {

// Each pixel takes a general register for its address. With one vector 8 would hide the latency of
// a multiply-add, but 10 load fewer weights (8x8 blocks, AVX2: 52 to 58 GFLOP/s), and 11 spill.
constexpr int kMostPixels = 10;
// With two vectors 12 accumulators of 16 registers, and 3 for the operands.
template <int Vectors>
constexpr int kTilePixels = Vectors == 1 || FASTPRUNE_VECTOR_BYTES == 64 ? kMostPixels : 6;

// Lines of memory that the next group reads, fetched a few at a time.
class Fetch {
 public:
  // Addresses [begin, end), in `turns` turns.
  Fetch(int64_t begin, int64_t end, int64_t turns)
      : address_(begin),
        end_(end),
        bytes_a_turn_(turns > 0 ? (end - begin + turns - 1) / turns : 0) {}

  void turn() {
    const int64_t end = address_ + bytes_a_turn_ < end_ ? address_ + bytes_a_turn_ : end_;
    for (; address_ < end; address_ += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(address_));
    }
  }

 private:
  int64_t address_;
  int64_t end_;
  int64_t bytes_a_turn_;
};

// One entry of a list: its block's weights, the place of its tap's addresses in the group's table,
// and the first channel that it reads.
template <class T>
struct PixelEntry {
  const T* weights;
  int64_t sources;
  int64_t channel;
  int64_t steps;
};

// What becomes of the sums. Curved activations follow when they are stored.
template <class T>
struct PixelFinish {
  const T* bias;  // whole vectors
  bool clips;
  T lowest, highest;
  bool stream;  // past the caches
};

// Entries [begin, end) for `tiles` tiles, one after the other: their sums go to
// targets[p][channel...].
// Not inlined: among its callers' variables GCC keeps accumulators in memory.
template <class T, int Vectors, int Pixels>
__attribute__((noinline)) void pixel_tiles(const PixelEntry<T>* begin, const PixelEntry<T>* end,
                                           int64_t step_stride, const T* const* sources,
                                           const PixelFinish<T>& finish, T* const* targets,
                                           int64_t channel, int64_t tiles, Fetch& next_group) {
  using V = Vec<T, kLanes<T>>;
  const bool past_caches = finish.stream;
  for (; tiles > 0; --tiles, sources += Pixels, targets += Pixels) {
    next_group.turn();
    V acc[Pixels][Vectors] = {};
    if (!past_caches) {
#pragma GCC unroll 10
      for (int p = 0; p < Pixels; ++p) __builtin_prefetch(targets[p] + channel, 1);
    }
    for (const PixelEntry<T>* entry = begin; entry < end; ++entry) {
      const T* pixels[Pixels];
#pragma GCC unroll 10
      for (int p = 0; p < Pixels; ++p) pixels[p] = sources[entry->sources + p] + entry->channel;
      const T* w = entry->weights;
      const int64_t steps = entry->steps;
      for (int64_t b = 0; b < steps; ++b, w += step_stride) {
        V weights[Vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) weights[v] = load<V>(w + v * kLanes<T>);
#pragma GCC unroll 10
        for (int p = 0; p < Pixels; ++p) {
          const V value = broadcast<V>(pixels[p][b]);
#pragma GCC unroll 2
          for (int v = 0; v < Vectors; ++v) acc[p][v] += value * weights[v];
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const V bias = load<V>(finish.bias + v * kLanes<T>);
#pragma GCC unroll 10
      for (int p = 0; p < Pixels; ++p) acc[p][v] += bias;
    }
    if (finish.clips) {
      const V lowest = broadcast<V>(finish.lowest), highest = broadcast<V>(finish.highest);
#pragma GCC unroll 10
      for (int p = 0; p < Pixels; ++p) {
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
          // In this order NaN stays NaN.
          const V raised = acc[p][v] < lowest ? lowest : acc[p][v];
          acc[p][v] = raised > highest ? highest : raised;
        }
      }
    }
    if (past_caches) {
#pragma GCC unroll 10
      for (int p = 0; p < Pixels; ++p) {
        T* target = targets[p] + channel;
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) stream(target + v * kLanes<T>, acc[p][v]);
      }
    } else {
#pragma GCC unroll 10
      for (int p = 0; p < Pixels; ++p) {
        T* target = targets[p] + channel;
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) store(target + v * kLanes<T>, acc[p][v]);
      }
    }
  }
}

template <class T>
using PixelTilesFunction = void (*)(const PixelEntry<T>*, const PixelEntry<T>*, int64_t,
                                    const T* const*, const PixelFinish<T>&, T* const*, int64_t,
                                    int64_t, Fetch&);

// Tiles of a number of pixels, from 1 to kTilePixels; null past that.
template <class T, int Vectors, int Pixels = kTilePixels<Vectors>>
PixelTilesFunction<T> pixel_tiles_of(int64_t pixels) {
  if (pixels == Pixels) return pixel_tiles<T, Vectors, Pixels>;
  if constexpr (Pixels > 1) return pixel_tiles_of<T, Vectors, Pixels - 1>(pixels);
  return nullptr;
}

}  // namespace
}  // namespace fastprune
