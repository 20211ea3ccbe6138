// block_product with vectors along the outputs, for few samples.
//
// One register tile holds S samples x (V vectors of outputs) of accumulators, across all entries of
// a list. Inputs are read row-major in place: nothing is transposed, no lane is left idle. It needs
// output_stride == 1. With one sample two vectors of outputs are two chains of additions that wait
// for each other: there, four vectors of taller blocks make a tile, or neighbouring lists go side
// by side.
#pragma once

#include "activation.h"
#include "block_product.h"
#include "widen.h"

namespace fastprune {
namespace {

// 12 accumulators, of 16 registers or 32, with two vectors of outputs, and with four.
constexpr int kTileSamples = 6, kTallTileSamples = 3;
constexpr int kChains = 4;  // of additions, of a tile for one sample

// Adds the bias, activates and stores Vectors vectors of outputs of S samples.
template <int Lanes, int Vectors, int S, class T, class W>
inline void store_outputs(const MixedBlockProductArgs<T, W>& args, int64_t first_output,
                          int64_t sample, const Vec<T, Lanes> (&sums)[S][Vectors]) {
  using V = Vec<T, Lanes>;
  const int64_t remaining = args.output.cols - first_output;
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const int64_t count = remaining - v * Lanes;
    if (count <= 0) return;  // the last list reaches past the outputs
    const int64_t bytes = (count < Lanes ? count : Lanes) * sizeof(T);
    const T* bias = args.bias ? args.bias + first_output + v * Lanes : nullptr;
    T part[Lanes] = {};
    if (bias && count < Lanes) __builtin_memcpy(part, bias, bytes);
    const V added = bias && count >= Lanes ? load<V>(bias) : load<V>(part);
#pragma GCC unroll 6
    for (int s = 0; s < S; ++s) {
      const V result = activate<T, Lanes>(sums[s][v] + added, args.activation);
      T* target = args.output.data + (sample + s) * args.output.row_stride + first_output;
      if (count >= Lanes) {
        store(target + v * Lanes, result);
      } else {
        store(part, result);
        __builtin_memcpy(target + v * Lanes, part, bytes);
      }
    }
  }
}

// Outputs [output, output + Vectors * Lanes) of list `list`, samples [sample, sample + S).
// Not inlined: among its callers' variables GCC keeps accumulators in memory.
template <class T, class W, int Lanes, int Vectors, int S>
__attribute__((noinline)) void multiply_sample_tile(const MixedBlockProductArgs<T, W>& args,
                                                    int64_t list, int64_t output, int64_t sample) {
  using V = Vec<T, Lanes>;
  const auto& weight = args.weight;
  const int64_t stride = args.input.row_stride;
  const T* samples = args.input.data + sample * stride;
  V acc[S][Vectors] = {};

  for (int64_t j = weight.offsets[list]; j < weight.offsets[list + 1]; ++j) {
    const int64_t first = weight.sources[j] * weight.steps;
    const int64_t remaining = args.input.cols - first;
    const int64_t steps = weight.steps < remaining ? weight.steps : remaining;
    const int64_t block = weight.blocks ? weight.blocks[j] : j;
    const W* w = weight.values + block * weight.outputs * weight.steps + output;
    // One pointer for three samples: more would not fit the integer registers.
    const T* x[(S + 2) / 3];
    for (int group = 0; group < (S + 2) / 3; ++group) {
      x[group] = samples + first + 3 * group * stride;
    }
    for (int64_t b = 0; b < steps; ++b, w += weight.step_stride) {
      V values[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) values[v] = load_widened<V>(w + v * Lanes);
#pragma GCC unroll 6
      for (int s = 0; s < S; ++s) {
        const V input = broadcast<V>(x[s / 3][(s % 3) * stride + b]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) acc[s][v] += values[v] * input;
      }
    }
  }

  store_outputs<Lanes, Vectors, S>(args, list * weight.outputs + output, sample, acc);
}

// One sample and lists [list, list + Lists), whose blocks have Vectors vectors of outputs. Each
// list adds its entries in order, the bits are those of multiply_sample_tile.
template <class T, class W, bool kOneStep, int Lanes, int Vectors, int Lists>
__attribute__((noinline)) void multiply_side_by_side(const MixedBlockProductArgs<T, W>& args,
                                                     int64_t list) {
  using V = Vec<T, Lanes>;
  const auto& weight = args.weight;
  const T* input = args.input.data;
  const int64_t all_steps = kOneStep ? 1 : weight.steps;
  const int32_t* offsets = weight.offsets + list;
  const auto weights_of = [&](int64_t j) {
    return weight.values + (weight.blocks ? weight.blocks[j] : j) * weight.outputs * all_steps;
  };
  V acc[Lists][1][Vectors] = {};

  int64_t shared = offsets[1] - offsets[0];
  for (int l = 1; l < Lists; ++l) {
    const int64_t entries = offsets[l + 1] - offsets[l];
    shared = entries < shared ? entries : shared;
  }
  // The last block of a list may reach past the inputs.
  if (!kOneStep && shared > 0 && args.input.cols % all_steps != 0) --shared;
  for (int64_t k = 0; k < shared; ++k) {
    const W* w[Lists];
    const T* x[Lists];
#pragma GCC unroll 4
    for (int l = 0; l < Lists; ++l) {
      w[l] = weights_of(offsets[l] + k);
      x[l] = input + weight.sources[offsets[l] + k] * all_steps;
    }
    for (int64_t b = 0, step = 0; b < all_steps; ++b, step += weight.step_stride) {
#pragma GCC unroll 4
      for (int l = 0; l < Lists; ++l) {
        const V value = broadcast<V>(x[l][b]);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
          acc[l][0][v] += load_widened<V>(w[l] + step + v * Lanes) * value;
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < Lists; ++l) {
    for (int64_t j = offsets[l] + shared; j < offsets[l + 1]; ++j) {
      const int64_t first = weight.sources[j] * all_steps, remaining = args.input.cols - first;
      const int64_t steps = all_steps < remaining ? all_steps : remaining;
      const W* w = weights_of(j);
      for (int64_t b = 0; b < steps; ++b, w += weight.step_stride) {
        const V value = broadcast<V>(input[first + b]);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) acc[l][0][v] += load_widened<V>(w + v * Lanes) * value;
      }
    }
    store_outputs<Lanes, Vectors, 1>(args, (list + l) * weight.outputs, /*sample=*/0, acc[l]);
  }
}

template <class T, class W, int Lanes, int Vectors, int S>
void multiply_up_to(const MixedBlockProductArgs<T, W>& args, int64_t list, int64_t output,
                    int64_t sample, int64_t count) {
  if (count == S) {
    multiply_sample_tile<T, W, Lanes, Vectors, S>(args, list, output, sample);
  } else if constexpr (S > 1) {
    multiply_up_to<T, W, Lanes, Vectors, S - 1>(args, list, output, sample, count);
  }
}

// All samples, in register tiles of nearly equal height: 8 samples are 4 + 4, not 6 + 2, whose last
// tile would leave multipliers idle.
template <class T, class W, int Lanes, int Vectors>
void multiply_samples(const MixedBlockProductArgs<T, W>& args, int64_t list, int64_t output) {
  constexpr int kSamples = Vectors == 4 ? kTallTileSamples : kTileSamples;
  int64_t sample = 0;
  for (int64_t tiles = (args.input.rows + kSamples - 1) / kSamples; tiles > 0; --tiles) {
    const int64_t count = (args.input.rows - sample + tiles - 1) / tiles;
    multiply_up_to<T, W, Lanes, Vectors, kSamples>(args, list, output, sample, count);
    sample += count;
  }
}

// All samples for outputs [output, outputs) of a list, in ever narrower vectors: any number of
// outputs is covered.
template <class T, class W, int Lanes = kLanes<T>>
void multiply_few_samples(const MixedBlockProductArgs<T, W>& args, int64_t list,
                          int64_t output = 0) {
  const int64_t remaining = args.output.cols - list * args.weight.outputs;
  const int64_t outputs = args.weight.outputs < remaining ? args.weight.outputs : remaining;
  if constexpr (Lanes == kLanes<T>) {
    for (; args.input.rows <= kTallTileSamples && output + 3 * Lanes < outputs &&
           output + 4 * Lanes <= args.weight.outputs;
         output += 4 * Lanes) {
      multiply_samples<T, W, Lanes, 4>(args, list, output);
    }
    for (; output + Lanes < outputs && output + 2 * Lanes <= args.weight.outputs;
         output += 2 * Lanes) {
      multiply_samples<T, W, Lanes, 2>(args, list, output);
    }
  }
  for (; output < outputs && output + Lanes <= args.weight.outputs; output += Lanes) {
    multiply_samples<T, W, Lanes, 1>(args, list, output);
  }
  if constexpr (Lanes > 1) {
    if (output < outputs) multiply_few_samples<T, W, Lanes / 2>(args, list, output);
  }
}

// One sample: as many of lists [list, end) as go side by side, of blocks as high as one vector of
// some width, or two of the widest. Returns the first list that is left.
template <class T, class W, bool kOneStep, int Lanes = kLanes<T>>
int64_t multiply_one_sample(const MixedBlockProductArgs<T, W>& args, int64_t list, int64_t end) {
  if (Lanes == kLanes<T> && args.weight.outputs == 2 * Lanes) {
    for (; list + kChains / 2 <= end; list += kChains / 2) {
      multiply_side_by_side<T, W, kOneStep, Lanes, 2, kChains / 2>(args, list);
    }
  } else if (args.weight.outputs == Lanes) {
    for (; list + kChains <= end; list += kChains) {
      multiply_side_by_side<T, W, kOneStep, Lanes, 1, kChains>(args, list);
    }
  } else if constexpr (Lanes > 2) {
    return multiply_one_sample<T, W, kOneStep, Lanes / 2>(args, list, end);
  }
  return list;
}

// Lists [list, end).
template <class T, class W>
void multiply_few_samples_of_lists(const MixedBlockProductArgs<T, W>& args, int64_t list,
                                   int64_t end) {
  if (args.input.rows == 1) {
    list = args.weight.steps == 1 ? multiply_one_sample<T, W, true>(args, list, end)
                                  : multiply_one_sample<T, W, false>(args, list, end);
  }
  for (; list < end; ++list) multiply_few_samples(args, list);
}

}  // namespace
}  // namespace fastprune
