// block_product with vectors along the samples.
//
// A group of up to panel_vectors() vectors of samples is transposed into a panel,
// [features][width], that stays in the second-level cache. One register tile holds A outputs x V
// vectors of samples, across all entries of a list:
//
//               samples: V vectors
//             +------+------+------+
//   output 0  | acc  | acc  | acc  |   for each entry, for each of its steps b:
//   output 1  | acc  | acc  | acc  |     load V vectors of the panel's row
//     ...     |      |      |      |     for each output: acc += broadcast(block[a][b]) * vectors
//   output A-1  acc  | acc  | acc  |
//             +------+------+------+
//
// Outputs leave through the opposite transposition, block by block. Against vectors along the
// outputs this needs 11 loads for 24 multiply-adds where those need 26, whatever the block: blocks
// of eight rows and one column run at the rate of 32 x 32 (docs/kernels.md).
#pragma once

#include "activation.h"
#include "block_product.h"
#include "transpose.h"

namespace fastprune {
namespace {

#if defined(__AVX512F__)
constexpr int kPanelOutputs = 8;  // 24 of 32 registers, and 4 for the panel and the broadcast
#else
constexpr int kPanelOutputs = 4;  // 12 of 16 registers, and 4
#endif
constexpr int kPanelVectors = 3;
// For lists of one output, whose additions wait for each other: one more vector (AVX2, 768
// features, 90 % sparse: 43 for 38 GFLOP/s; six and eight, 36, read too much from the second-level
// cache).
constexpr int kWidePanelVectors = 4;

template <class T>
int panel_vectors(const BlockLists<T>& weight) {
  return weight.outputs == 1 ? kWidePanelVectors : kPanelVectors;
}

// Outputs [output, output + Outputs) of list `list`, for the whole width of the panel.
// Not inlined: among its callers' variables GCC keeps accumulators in memory.
// kUnitStride: weight.output_stride == 1, known to the compiler. kOneStep: weight.steps == 1, where
// a loop over the steps would cost more than what it does.
template <class T, bool kUnitStride, bool kOneStep, int Outputs, int Vectors>
__attribute__((noinline)) void multiply_panel_tile(const BlockLists<T>& weight, int64_t list,
                                                   int64_t output, int64_t features, const T* panel,
                                                   T* result) {
  using V = Vec<T, kLanes<T>>;
  constexpr int64_t kWidth = Vectors * kLanes<T>;
  const int64_t output_stride = kUnitStride ? 1 : weight.output_stride;
  const int64_t block_size = kOneStep ? weight.outputs : weight.outputs * weight.steps;
  V acc[Outputs][Vectors] = {};
  const int64_t last = weight.offsets[list + 1];
  for (int64_t j = weight.offsets[list]; j < last; ++j) {
    const int64_t first = kOneStep ? weight.sources[j] : weight.sources[j] * weight.steps;
    const int64_t remaining = features - first;
    const int64_t steps = kOneStep ? 1 : weight.steps < remaining ? weight.steps : remaining;
    const int64_t block = weight.blocks ? weight.blocks[j] : j;
    const T* w = weight.values + block * block_size + output * output_stride;
    const T* x = panel + first * kWidth;
    if constexpr (!kUnitStride) {
      // The next block lies anywhere: its first lines are fetched meanwhile.
      const int64_t next = weight.blocks && j + 1 < last ? weight.blocks[j + 1] : block;
      const T* lines = weight.values + next * block_size + output * output_stride;
#pragma GCC unroll 8
      for (int a = 0; a < Outputs; ++a) __builtin_prefetch(lines + a * output_stride);
    }
    for (int64_t b = 0; b < steps; ++b, w += weight.step_stride, x += kWidth) {
      // Weights past the second-level cache arrive in time; 16 or 64 steps do as well.
      if constexpr (kUnitStride && !kOneStep) __builtin_prefetch(w + 32 * weight.step_stride);
      V samples[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) samples[v] = load<V>(x + v * kLanes<T>);
#pragma GCC unroll 8
      for (int a = 0; a < Outputs; ++a) {
        const V value = broadcast<V>(w[a * output_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) acc[a][v] += value * samples[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < Outputs; ++a) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(result + a * kWidth + v * kLanes<T>, acc[a][v]);
  }
}

// Outputs [output, end) of a list into consecutive rows of `result`, in ever lower tiles: any
// number of outputs is covered.
template <class T, bool kUnitStride, bool kOneStep, int Outputs, int Vectors>
void multiply_list(const BlockLists<T>& weight, int64_t list, int64_t output, int64_t end,
                   int64_t features, const T* panel, T* result) {
  constexpr int64_t kWidth = Vectors * kLanes<T>;
  for (; output + Outputs <= end; output += Outputs, result += Outputs * kWidth) {
    multiply_panel_tile<T, kUnitStride, kOneStep, Outputs, Vectors>(weight, list, output, features,
                                                                    panel, result);
  }
  if constexpr (Outputs > 1) {
    if (output < end) {
      multiply_list<T, kUnitStride, kOneStep, Outputs / 2, Vectors>(weight, list, output, end,
                                                                    features, panel, result);
    }
  }
}

// Outputs [list, list + Lists) of lists of one output each, side by side: the additions of one
// alone would wait for each other. Each adds its entries in order.
template <class T, bool kOneStep, int Lists, int Vectors>
__attribute__((noinline)) void multiply_lists_of_one(const BlockLists<T>& weight, int64_t list,
                                                     int64_t features, const T* panel, T* result) {
  using V = Vec<T, kLanes<T>>;
  constexpr int64_t kWidth = Vectors * kLanes<T>;
  const int64_t steps = kOneStep ? 1 : weight.steps;
  const int32_t* offsets = weight.offsets + list;
  const auto weights_of = [&](int64_t j) {
    return weight.values + (weight.blocks ? weight.blocks[j] : j) * steps;
  };
  V acc[Lists][Vectors] = {};

  int64_t shared = Lists > 1 ? offsets[1] - offsets[0] : 0;
  for (int l = 1; l < Lists; ++l) {
    const int64_t entries = offsets[l + 1] - offsets[l];
    shared = entries < shared ? entries : shared;
  }
  // The last block of a list may reach past the features.
  if (!kOneStep && shared > 0 && features % steps != 0) --shared;
  for (int64_t k = 0; k < shared; ++k) {
    const T* w[Lists];
    const T* x[Lists];
#pragma GCC unroll 4
    for (int l = 0; l < Lists; ++l) {
      w[l] = weights_of(offsets[l] + k);
      x[l] = panel + weight.sources[offsets[l] + k] * steps * kWidth;
    }
    for (int64_t b = 0; b < steps; ++b) {
#pragma GCC unroll 4
      for (int l = 0; l < Lists; ++l) {
        const V value = broadcast<V>(w[l][b]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          acc[l][v] += value * load<V>(x[l] + b * kWidth + v * kLanes<T>);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < Lists; ++l) {
    for (int64_t j = offsets[l] + shared; j < offsets[l + 1]; ++j) {
      const int64_t first = weight.sources[j] * steps, remaining = features - first;
      const int64_t count = steps < remaining ? steps : remaining;
      const T* w = weights_of(j);
      const T* x = panel + first * kWidth;
      for (int64_t b = 0; b < count; ++b, x += kWidth) {
        const V value = broadcast<V>(w[b]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) acc[l][v] += value * load<V>(x + v * kLanes<T>);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(result + l * kWidth + v * kLanes<T>, acc[l][v]);
  }
}

// Outputs [output, end) of the whole product, which may span lists.
template <class T, bool kUnitStride, bool kOneStep, int Vectors>
void multiply_outputs(const BlockLists<T>& weight, int64_t output, int64_t end, int64_t features,
                      const T* panel, T* result) {
  constexpr int64_t kWidth = Vectors * kLanes<T>;
  if (weight.outputs == 1) {
    constexpr int kLists = Vectors == 1 ? 4 : 2;
    for (; output + kLists <= end; output += kLists, result += kLists * kWidth) {
      multiply_lists_of_one<T, kOneStep, kLists, Vectors>(weight, output, features, panel, result);
    }
    for (; output < end; ++output, result += kWidth) {
      multiply_lists_of_one<T, kOneStep, 1, Vectors>(weight, output, features, panel, result);
    }
    return;
  }
  // As many accumulators as there are multiply-adds in flight at the least.
  constexpr int kOutputs = Vectors > kPanelVectors ? 1 : Vectors == 1 ? 8 : kPanelOutputs;
  while (output < end) {
    const int64_t list = output / weight.outputs, list_begin = list * weight.outputs;
    const int64_t list_end = list_begin + weight.outputs < end ? list_begin + weight.outputs : end;
    multiply_list<T, kUnitStride, kOneStep, kOutputs, Vectors>(
        weight, list, output - list_begin, list_end - list_begin, features, panel, result);
    result += (list_end - output) * kWidth;
    output = list_end;
  }
}

// Adds the bias and applies the activation to `outputs` rows of `result`.
template <class T, int Vectors>
void finish(const T* bias, Activation activation, int64_t outputs, T* result) {
  using V = Vec<T, kLanes<T>>;
  if (bias == nullptr && activation == Activation::kNone) return;
  for (int64_t o = 0; o < outputs; ++o) {
    const V output_bias = broadcast<V>(bias ? bias[o] : T{});
    for (int v = 0; v < Vectors; ++v, result += kLanes<T>) {
      store(result, activate<T, kLanes<T>>(load<V>(result) + output_bias, activation));
    }
  }
}

// Outputs whose values are one cache line leave together: wider rows of them would evict each other
// before they are written (32 x 32 blocks: twice the time for the store).
template <class T>
constexpr int64_t kStoredOutputs = 64 / sizeof(T);

// Whether outputs are better written past the caches. Where a vector is a line that pays from about
// 4 MiB on, even if the next layer reads them (AVX-512, four layers of 768 x 768, 90 % sparse: 1.01
// to 1.13 times faster from 1024 samples on, slower below). Two vectors a line, AVX2, lose at any
// size: 12.3 for 4.9 ms (1024 samples, 1536 x 384, 75 % sparse), and 5.9 where they follow each
// other at once. Every vector must be aligned.
template <class T>
bool can_stream(const MatrixView<T>& output) {
  constexpr int64_t kWorthwhile = int64_t{4} << 20;
  constexpr int64_t kSize = sizeof(T);
  return kCanStream && kLanes<T> * kSize == 64 &&
         output.rows * output.cols * kSize >= kWorthwhile &&
         output.row_stride % kStoredOutputs<T> == 0 &&
         reinterpret_cast<uintptr_t>(output.data) % 64 == 0;
}

// dst[n][o] = result[o][n] for one cache line of outputs and the panel's whole width.
template <class T, int Vectors>
void stream_outputs(const T* result, T* dst, int64_t dst_stride) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kWidth = Vectors * L;
  for (int64_t n = 0; n < kWidth; n += L) {
    for (int64_t o = 0; o < kStoredOutputs<T>; o += L) {
      transpose_square<T, L, true>(result + o * kWidth + n, kWidth, dst + n * dst_stride + o,
                                   dst_stride);
    }
  }
}

// One group of samples, lists [first_list, last_list). args.input and args.output are the group's.
template <class T, int Vectors>
void multiply_group_of(const BlockProductArgs<T>& args, bool stream_output, int64_t first_list,
                       int64_t last_list, T* scratch) {
  constexpr int64_t kWidth = Vectors * kLanes<T>;
  const int64_t samples = args.input.rows, features = args.input.cols;
  const int64_t list_outputs = args.weight.outputs;
  const bool unit_stride = args.weight.output_stride == 1, one_step = args.weight.steps == 1;
  const auto multiply = unit_stride ? one_step ? multiply_outputs<T, true, true, Vectors>
                                               : multiply_outputs<T, true, false, Vectors>
                        : one_step  ? multiply_outputs<T, false, true, Vectors>
                                    : multiply_outputs<T, false, false, Vectors>;
  T* panel = scratch;
  T* result = scratch + features * kWidth;
  transpose<T, true>(args.input.data, args.input.row_stride, samples, features, panel, kWidth);
  // Lanes without a sample are computed and dropped; what they hold must not be slow to multiply.
  for (int64_t i = 0; samples < kWidth && i < features; ++i) {
    for (int64_t n = samples; n < kWidth; ++n) panel[i * kWidth + n] = T{};
  }
  // Lists of few outputs are stored together.
  const int64_t lists_together =
      kStoredOutputs<T> % list_outputs == 0 ? kStoredOutputs<T> / list_outputs : 1;
  for (int64_t list = first_list, next; list < last_list; list = next) {
    next = (list / lists_together + 1) * lists_together;
    if (next > last_list) next = last_list;
    const int64_t end =
        next * list_outputs < args.output.cols ? next * list_outputs : args.output.cols;
    for (int64_t first = list * list_outputs; first < end; first += kStoredOutputs<T>) {
      const int64_t count = first + kStoredOutputs<T> < end ? kStoredOutputs<T> : end - first;
      T* output = args.output.data + first;
      const bool stream = stream_output && samples == kWidth && count == kStoredOutputs<T> &&
                          first % kStoredOutputs<T> == 0;
      // The lines that the next outputs go to are fetched while these are computed; those of the
      // first are late.
      for (int64_t n = 0; !stream && n < samples; ++n) {
        __builtin_prefetch(output + n * args.output.row_stride + count, 1);
      }
      multiply(args.weight, first, first + count, features, panel, result);
      finish<T, Vectors>(args.bias ? args.bias + first : nullptr, args.activation, count, result);
      if (stream) {
        stream_outputs<T, Vectors>(result, output, args.output.row_stride);
      } else {
        transpose(result, kWidth, count, samples, output, args.output.row_stride);
      }
    }
  }
}

template <class T>
void multiply_group(const BlockProductArgs<T>& args, int64_t vectors, bool stream_output,
                    int64_t first_list, int64_t last_list, T* scratch) {
  static_assert(kPanelVectors == 3 && kWidePanelVectors == 4);
  switch (vectors) {
    case 1:
      return multiply_group_of<T, 1>(args, stream_output, first_list, last_list, scratch);
    case 2:
      return multiply_group_of<T, 2>(args, stream_output, first_list, last_list, scratch);
    case 3:
      return multiply_group_of<T, 3>(args, stream_output, first_list, last_list, scratch);
    default:
      return multiply_group_of<T, 4>(args, stream_output, first_list, last_list, scratch);
  }
}

}  // namespace
}  // namespace fastprune
