// ablate_linear on the CPU; formula and contract are in ../ablate_linear.h.
//
// The weights of a piece are transposed once, to [column][row]. Vectors lie along the outputs, so
// that what a sample keeps is copied, and what it loses subtracted, in one pass over its row. A
// register tile of some samples x some vectors of outputs runs over the piece's columns.
#include "../ablate_linear.h"

#include "transpose.h"
#include "vec.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// Accumulators for 24 of 32 registers with AVX-512, 8 of 16 without; one vector of outputs, as a
// block of 16 rows has, takes more samples to fill the units that add.
constexpr int kWideVectors = FASTPRUNE_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kWideSamples = FASTPRUNE_VECTOR_BYTES == 64 ? 6 : 4;
constexpr int kNarrowSamples = 8;

template <class T>
struct Rows {
  const T* output;
  int64_t output_stride;
  const T* input;
  int64_t input_stride;
  T* masked;
  int64_t masked_stride;
};

// The first `count` lanes; the others are 0.
template <class T>
inline Vec<T, kLanes<T>> load_part(const T* source, int64_t count) {
  T lanes[kLanes<T>] = {};
  __builtin_memcpy(lanes, source, count * sizeof(T));
  return load<Vec<T, kLanes<T>>>(lanes);
}

template <class T>
inline void store_part(T* target, Vec<T, kLanes<T>> value, int64_t count) {
  __builtin_memcpy(target, &value, count * sizeof(T));
}

// Samples x Vectors of outputs; kPart: the only vector has `count` outputs. Not inlined, so that
// the accumulators stay in registers.
template <class T, int Samples, int Vectors, bool kPart>
__attribute__((noinline)) void subtract_tile(const Rows<T>& rows, const T* weight,
                                             int64_t weight_stride, int64_t cols, int64_t count) {
  using V = Vec<T, kLanes<T>>;
  V sums[Samples][Vectors] = {};
  for (int64_t j = 0; j < cols; ++j) {
    V weights[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      weights[v] = load<V>(weight + j * weight_stride + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int n = 0; n < Samples; ++n) {
      const V input = broadcast<V>(rows.input[n * rows.input_stride + j]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[n][v] += weights[v] * input;
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < Samples; ++n) {
    const T* output = rows.output + n * rows.output_stride;
    T* masked = rows.masked + n * rows.masked_stride;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      if constexpr (kPart) {
        store_part<T>(masked, load_part(output, count) - sums[n][v], count);
      } else {
        store(masked + v * kLanes<T>, load<V>(output + v * kLanes<T>) - sums[n][v]);
      }
    }
  }
}

template <class T>
Rows<T> shifted(const Rows<T>& rows, int64_t sample, int64_t output) {
  return {rows.output + sample * rows.output_stride + output,
          rows.output_stride,
          rows.input + sample * rows.input_stride,
          rows.input_stride,
          rows.masked + sample * rows.masked_stride + output,
          rows.masked_stride};
}

// All outputs of a piece for Samples samples.
template <class T, int Samples>
void subtract_outputs(const Rows<T>& rows, const T* weight, int64_t weight_stride, int64_t outputs,
                      int64_t cols) {
  constexpr int kWide = Samples <= kWideSamples ? kWideVectors : 1;
  int64_t r = 0;
  for (; r + kWide * kLanes<T> <= outputs; r += kWide * kLanes<T>) {
    subtract_tile<T, Samples, kWide, false>(shifted(rows, 0, r), weight + r, weight_stride, cols,
                                            0);
  }
  for (; r + kLanes<T> <= outputs; r += kLanes<T>) {
    subtract_tile<T, Samples, 1, false>(shifted(rows, 0, r), weight + r, weight_stride, cols, 0);
  }
  if (r < outputs) {
    subtract_tile<T, Samples, 1, true>(shifted(rows, 0, r), weight + r, weight_stride, cols,
                                       outputs - r);
  }
}

template <class T>
void copy(const T* source, T* target, int64_t count) {
  if (count > 0) __builtin_memcpy(target, source, count * sizeof(T));
}

template <class T, int Samples>
void ablate_samples(const Rows<T>& rows, const int32_t* piece, int64_t out_features,
                    const T* weight, int64_t weight_stride) {
  const int64_t row_begin = piece[0], row_end = piece[1];
  for (int n = 0; n < Samples; ++n) {
    const Rows<T> row = shifted(rows, n, 0);
    copy(row.output, row.masked, row_begin);
    copy(row.output + row_end, row.masked + row_end, out_features - row_end);
  }
  subtract_outputs<T, Samples>(shifted(rows, 0, row_begin), weight, weight_stride,
                               row_end - row_begin, piece[3] - piece[2]);
}

template <class T>
int64_t padded_rows(const int32_t* piece) {
  return (piece[1] - piece[0] + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Samples [begin, end) of one piece.
template <class T>
void ablate_piece(const AblateLinearArgs<T>& args, int64_t index, int64_t begin, int64_t end,
                  T* weight) {
  const int32_t* piece = args.pieces + 4 * index;
  const int64_t rows = piece[1] - piece[0], cols = piece[3] - piece[2];
  const int64_t out_features = args.output.cols, stride = padded_rows<T>(piece);
  transpose(args.weight.data + piece[0] * args.weight.row_stride + piece[2], args.weight.row_stride,
            rows, cols, weight, stride);
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t r = rows; r < stride; ++r) weight[j * stride + r] = T{0};
  }
  const Rows<T> all = {args.output.data,
                       args.output.row_stride,
                       args.input.data + piece[2],
                       args.input.row_stride,
                       args.masked + index * args.output.rows * out_features,
                       out_features};
  int64_t n = begin;
  if (stride < kWideVectors * kLanes<T>) {
    for (; n + kNarrowSamples <= end; n += kNarrowSamples) {
      ablate_samples<T, kNarrowSamples>(shifted(all, n, 0), piece, out_features, weight, stride);
    }
  }
  for (; n + kWideSamples <= end; n += kWideSamples) {
    ablate_samples<T, kWideSamples>(shifted(all, n, 0), piece, out_features, weight, stride);
  }
  for (; n < end; ++n) {
    ablate_samples<T, 1>(shifted(all, n, 0), piece, out_features, weight, stride);
  }
}

}  // namespace

template <class T>
int64_t ablate_linear_scratch(const AblateLinearArgs<T>& args) {
  int64_t largest = 0;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* piece = args.pieces + 4 * m;
    const int64_t size = padded_rows<T>(piece) * (piece[3] - piece[2]);
    largest = size > largest ? size : largest;
  }
  return largest;
}

// Positions [begin, end) of the grid [piece][sample], samples innermost.
template <class T>
void ablate_linear(const AblateLinearArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const int64_t samples = args.output.rows;
  while (begin < end) {
    const int64_t first = begin % samples, left = end - begin;
    const int64_t last = left < samples - first ? first + left : samples;
    ablate_piece(args, begin / samples, first, last, scratch);
    begin += last - first;
  }
}

template int64_t ablate_linear_scratch(const AblateLinearArgs<float>&);
template int64_t ablate_linear_scratch(const AblateLinearArgs<double>&);
template void ablate_linear(const AblateLinearArgs<float>&, int64_t, int64_t, float*);
template void ablate_linear(const AblateLinearArgs<double>&, int64_t, int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
