// block_sparse_linear forward on the CPU; the contract is in ../block_sparse_linear.h.
//
// One register tile holds S samples x (V vectors of outputs) of accumulators, across all kept
// blocks of a block row:
//
//              outputs: V vectors, side by side in the packed block
//            +--------+--------+
//   sample 0 |  acc   |  acc   |   for each kept block, for each of its columns c:
//   sample 1 |  acc   |  acc   |     load V vectors of weights [c][0 .. V * lanes)
//     ...    |        |        |     for each sample: acc += broadcast(input[sample][c]) * weights
//   sample S-1  acc   |  acc   |
//            +--------+--------+
//
// With AVX2 that is 6 x 2 = 12 accumulators, enough to hide the latency of 2 fused
// multiply-adds a cycle, for 6 broadcasts and 2 loads: the two load ports are not the limit.
// Where one vector covers the block's rows, 12 samples take the place of 2 vectors. Inputs are
// read row-major in place; a tile of samples stays in the second-level cache.
#include "../block_sparse_linear.h"

#include "vec.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kWideSamples = 12;  // 24 of 32 registers
constexpr int kNarrowSamples = 12;
#elif defined(__AVX2__)
constexpr int kWideSamples = 6;  // 12 of 16 registers, and 3 for weights and the broadcast
constexpr int kNarrowSamples = 12;
#else
constexpr int kWideSamples = 4;
constexpr int kNarrowSamples = 8;
#endif

template <class V>
inline V activate(V value, Activation activation) {
  // Written so that NaN stays NaN.
  return activation == Activation::kRelu ? (value < V{} ? V{} : value) : value;
}

// Outputs [row, row + Vectors * Lanes) of block row `block_row`, samples [sample, sample + S).
// Not inlined: among its callers' variables GCC keeps half of the accumulators in memory, which
// halves the speed.
template <class T, int Lanes, int Vectors, int S>
__attribute__((noinline)) void multiply_tile(const BlockSparseLinearArgs<T>& args,
                                             int64_t block_row, int64_t row, int64_t sample) {
  using V = Vec<T, Lanes>;
  const auto& weight = args.weight;
  const int64_t stride = args.input.row_stride;
  const T* samples = args.input.data + sample * stride;
  V acc[S][Vectors] = {};

  for (int64_t k = weight.crow_indices[block_row]; k < weight.crow_indices[block_row + 1]; ++k) {
    const int64_t first_column = weight.col_indices[k] * weight.cols;
    const int64_t remaining = args.input.cols - first_column;
    const int64_t columns = weight.cols < remaining ? weight.cols : remaining;
    const T* w = weight.packed_values + k * weight.cols * weight.rows + row;
    // One pointer for three samples: twelve would not fit the integer registers.
    const T* x[(S + 2) / 3];
    for (int group = 0; group < (S + 2) / 3; ++group) {
      x[group] = samples + first_column + 3 * group * stride;
    }
    for (int64_t c = 0; c < columns; ++c, w += weight.rows) {
      V values[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) values[v] = load<V>(w + v * Lanes);
#pragma GCC unroll 12
      for (int s = 0; s < S; ++s) {
        const V input = broadcast<V>(x[s / 3][(s % 3) * stride + c]);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) acc[s][v] += input * values[v];
      }
    }
  }

  const int64_t first_output = block_row * weight.rows + row;
  const int64_t remaining = args.output.cols - first_output;
  T* output = args.output.data + sample * args.output.row_stride + first_output;
  if (remaining >= Vectors * Lanes) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const V bias = args.bias ? load<V>(args.bias + first_output + v * Lanes) : V{};
#pragma GCC unroll 12
      for (int s = 0; s < S; ++s) {
        store(output + s * args.output.row_stride + v * Lanes,
              activate(acc[s][v] + bias, args.activation));
      }
    }
    return;
  }
  // The last block row reaches past the outputs: its padded rows are not stored.
  T padded_bias[Vectors * Lanes] = {};
  for (int64_t o = 0; o < remaining; ++o)
    padded_bias[o] = args.bias ? args.bias[first_output + o] : T{};
#pragma GCC unroll 12
  for (int s = 0; s < S; ++s) {
    T values[Vectors * Lanes];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const V bias = load<V>(padded_bias + v * Lanes);
      store(values + v * Lanes, activate(acc[s][v] + bias, args.activation));
    }
    for (int64_t o = 0; o < remaining; ++o) output[s * args.output.row_stride + o] = values[o];
  }
}

template <class T, int Lanes, int Vectors, int S>
void multiply_up_to(const BlockSparseLinearArgs<T>& args, int64_t block_row, int64_t row,
                    int64_t sample, int64_t count) {
  if (count == S) {
    multiply_tile<T, Lanes, Vectors, S>(args, block_row, row, sample);
  } else if constexpr (S > 1) {
    multiply_up_to<T, Lanes, Vectors, S - 1>(args, block_row, row, sample, count);
  }
}

// All samples, in register tiles of nearly equal height: 14 samples are 5 + 5 + 4, not 6 + 6 + 2,
// whose last tile would leave multipliers idle.
template <class T, int Lanes, int Vectors, int S>
void multiply_samples(const BlockSparseLinearArgs<T>& args, int64_t block_row, int64_t row) {
  int64_t sample = 0;
  for (int64_t tiles = (args.input.rows + S - 1) / S; tiles > 0; --tiles) {
    const int64_t count = (args.input.rows - sample + tiles - 1) / tiles;
    multiply_up_to<T, Lanes, Vectors, S>(args, block_row, row, sample, count);
    sample += count;
  }
}

// All samples for rows [row, rows) of a block row, in ever narrower vectors: any number of rows is
// covered.
template <class T, int Lanes>
void multiply_rows(const BlockSparseLinearArgs<T>& args, int64_t block_row, int64_t row) {
  if constexpr (Lanes == kLanes<T>) {
    for (; row + 2 * Lanes <= args.weight.rows; row += 2 * Lanes) {
      multiply_samples<T, Lanes, 2, kWideSamples>(args, block_row, row);
    }
  }
  for (; row + Lanes <= args.weight.rows; row += Lanes) {
    multiply_samples<T, Lanes, 1, kNarrowSamples>(args, block_row, row);
  }
  if constexpr (Lanes > 1) {
    if (row < args.weight.rows) multiply_rows<T, Lanes / 2>(args, block_row, row);
  }
}

// The first block row that starts at or after position `cost` of a tile.
template <class T>
int64_t first_block_row(const BlockSparseView<T>& weight, int64_t cost) {
  int64_t low = 0, high = weight.block_rows;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (weight.crow_indices[middle] + middle < cost) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One tile of samples as a problem of its own, its inputs copied to `scratch` where the plan asks.
template <class T>
BlockSparseLinearArgs<T> tile_of(const BlockSparseLinearArgs<T>& args,
                                 const BlockSparseLinearWork& work, int64_t tile, T* scratch) {
  const int64_t first = tile * work.samples_per_tile;
  const int64_t remaining = args.input.rows - first;
  BlockSparseLinearArgs<T> result = args;
  result.input.rows = work.samples_per_tile < remaining ? work.samples_per_tile : remaining;
  result.input.data += first * args.input.row_stride;
  result.output.rows = result.input.rows;
  result.output.data += first * args.output.row_stride;
  if (work.scratch_stride == 0) return result;
  for (int64_t s = 0; s < result.input.rows; ++s) {
    __builtin_memcpy(scratch + s * work.scratch_stride,
                     result.input.data + s * args.input.row_stride, args.input.cols * sizeof(T));
  }
  result.input.data = scratch;
  result.input.row_stride = work.scratch_stride;
  return result;
}

}  // namespace

template <class T>
void block_sparse_linear(const BlockSparseLinearArgs<T>& args, int64_t begin, int64_t end,
                         T* scratch) {
  const BlockSparseLinearWork work = plan_block_sparse_linear(args);
  const auto& weight = args.weight;
  for (int64_t tile = begin / work.cost_per_tile; tile < work.sample_tiles; ++tile) {
    const int64_t tile_begin = begin - tile * work.cost_per_tile;
    const int64_t tile_end = end - tile * work.cost_per_tile;
    if (tile_end <= 0) return;
    const int64_t first_row = tile_begin > 0 ? first_block_row(weight, tile_begin) : 0;
    const int64_t last_row =
        tile_end < work.cost_per_tile ? first_block_row(weight, tile_end) : weight.block_rows;
    if (first_row == last_row) continue;
    const BlockSparseLinearArgs<T> tile_args = tile_of(args, work, tile, scratch);
    for (int64_t block_row = first_row; block_row < last_row; ++block_row) {
      multiply_rows<T, kLanes<T>>(tile_args, block_row, 0);
    }
  }
}

template void block_sparse_linear(const BlockSparseLinearArgs<float>&, int64_t, int64_t, float*);
template void block_sparse_linear(const BlockSparseLinearArgs<double>&, int64_t, int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
