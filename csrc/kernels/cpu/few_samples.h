// block_product with vectors along the outputs, for fewer samples than a vector holds.
//
// One register tile holds S samples x (V vectors of outputs) of accumulators, across all entries of
// a list. Inputs are read row-major in place: nothing is transposed, no lane is left idle. It needs
// output_stride == 1.
#pragma once

#include "activation.h"
#include "block_product.h"
#include "widen.h"

namespace fastprune {
namespace {

constexpr int kTileSamples = 6;  // x 2 vectors: 12 accumulators, of 16 registers or 32

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
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) values[v] = load_widened<V>(w + v * Lanes);
#pragma GCC unroll 6
      for (int s = 0; s < S; ++s) {
        const V input = broadcast<V>(x[s / 3][(s % 3) * stride + b]);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) acc[s][v] += values[v] * input;
      }
    }
  }

  const int64_t first_output = list * weight.outputs + output;
  const int64_t remaining = args.output.cols - first_output;
  for (int v = 0; v < Vectors; ++v) {
    const int64_t count = remaining - v * Lanes < Lanes ? remaining - v * Lanes : Lanes;
    if (count <= 0) return;  // the last list reaches past the outputs
    T bias[Lanes] = {};
    if (args.bias) {
      __builtin_memcpy(bias, args.bias + first_output + v * Lanes, count * sizeof(T));
    }
#pragma GCC unroll 6
    for (int s = 0; s < S; ++s) {
      T values[Lanes];
      store(values, activate<T, Lanes>(acc[s][v] + load<V>(bias), args.activation));
      T* target = args.output.data + (sample + s) * args.output.row_stride + first_output;
      __builtin_memcpy(target + v * Lanes, values, count * sizeof(T));
    }
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
  int64_t sample = 0;
  for (int64_t tiles = (args.input.rows + kTileSamples - 1) / kTileSamples; tiles > 0; --tiles) {
    const int64_t count = (args.input.rows - sample + tiles - 1) / tiles;
    multiply_up_to<T, W, Lanes, Vectors, kTileSamples>(args, list, output, sample, count);
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

}  // namespace
}  // namespace fastprune
