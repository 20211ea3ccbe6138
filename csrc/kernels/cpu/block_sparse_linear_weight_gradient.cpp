// The weight gradient of block_sparse_linear on the CPU; the contract is in
// ../block_sparse_linear_weight_gradient.h.
//
// A tile of samples is copied to panels: one of the inputs for each block column,
// [samples][cols], which stay in the second-level cache, and one of the output gradients for the
// block row at hand, [samples][rows]. All columns of a block row's kept blocks lie one after the
// other in the packed gradient; C of them at a time, across blocks, form a register tile:
//
//             rows: a vector
//              +---------+
//   column 0   |   acc   |   for each sample of the tile:
//     ...      |   acc   |     load a vector of output gradients
//   column C-1 |   acc   |     for each column: acc += broadcast(input) * vector
//              +---------+
#include "../block_sparse_linear_weight_gradient.h"

#include "transpose.h"
#include "vec.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kColumns = 16;
#else
constexpr int kColumns = 8;  // the fewest accumulators that hide the latency of multiply-adds
#endif

// Columns whose inputs lie side by side in a panel: all of a block where they come in fours.
constexpr int kRun = 4;

// Samples that are copied together, in which each panel gets consecutive lines.
constexpr int64_t kSamplesTogether = 8;

// The kept columns of one block row, Run by Run: where the inputs of each begin.
template <class T>
struct PanelColumns {
  const T* panels;
  const int64_t* offsets;  // [columns / Run]
  int64_t step;            // from one sample to the next
};

// One tile of samples of one block row. The gradients are cut into panels of one vector of rows,
// the last narrower: row r of sample n is at grads[r / L * L * samples + n * width + r % L].
template <class T>
struct RowTile {
  PanelColumns<T> inputs;
  const T* grads;
  int64_t rows;
  int64_t samples;
  bool first;  // nothing is in grad_values yet
};

// Adds the products for columns [column, column + Columns) and Lanes rows from `row` on; target is
// where they go.
template <class T, int Lanes, int Columns, int Run>
__attribute__((noinline)) void add_products(const RowTile<T>& tile, int64_t column, int64_t row,
                                            T* target) {
  using V = Vec<T, Lanes>;
  constexpr int kGroup = Run < Columns ? Run : Columns;
  const T* x[Columns / kGroup];
  for (int i = 0; i < Columns / kGroup; ++i) {
    const int64_t index = column + i * kGroup;
    x[i] = tile.inputs.panels + tile.inputs.offsets[index / Run] + index % Run;
  }
  const int64_t step = tile.inputs.step, rows = tile.rows, samples = tile.samples;
  const int64_t panel_row = row - row % kLanes<T>;
  const int64_t width = rows - panel_row < kLanes<T> ? rows - panel_row : kLanes<T>;
  const T* grads = tile.grads + panel_row * samples + row % kLanes<T>;
  V acc[Columns] = {};
  if (!tile.first) {
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) acc[c] = load<V>(target + c * rows);
  }
  for (int64_t n = 0, offset = 0; n < samples; ++n, offset += step, grads += width) {
    const V values = load<V>(grads);
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) {
      acc[c] += broadcast<V>(x[c / kGroup][c % kGroup + offset]) * values;
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < Columns; ++c) store(target + c * rows, acc[c]);
}

// Columns [column, columns), in ever lower register tiles. target: the block row's gradients from
// `row` on.
template <class T, int Lanes, int Columns, int Run>
void add_columns(const RowTile<T>& tile, int64_t column, int64_t columns, int64_t row, T* target) {
  for (; column + Columns <= columns; column += Columns) {
    add_products<T, Lanes, Columns, Run>(tile, column, row, target + column * tile.rows);
  }
  if constexpr (Columns > 1) {
    if (column < columns) {
      add_columns<T, Lanes, Columns / 2, Run>(tile, column, columns, row, target);
    }
  }
}

// All rows from `row` on, in ever narrower vectors. target: the block row's gradients.
template <class T, int Run, int Lanes = kLanes<T>>
void add_rows(const RowTile<T>& tile, int64_t columns, int64_t row, T* target) {
  for (; row + Lanes <= tile.rows; row += Lanes) {
    add_columns<T, Lanes, kColumns, Run>(tile, 0, columns, row, target + row);
  }
  if constexpr (Lanes > 1) {
    if (row < tile.rows) add_rows<T, Run, Lanes / 2>(tile, columns, row, target);
  }
}

// panel[n][i] = source[n * stride + i] for Width columns. The rows that come next are fetched: they
// lie too far apart for the hardware to see it.
template <class T, int Width>
void copy_columns(const T* source, int64_t stride, int64_t samples, T* panel) {
  for (int64_t n = 0; n < samples; ++n, source += stride, panel += Width) {
    __builtin_prefetch(source + kSamplesTogether * stride);
    store(panel, load<Vec<T, Width>>(source));
  }
}

// panel[n][i] = matrix[sample + n, first + i], zeros past the matrix.
template <class T>
void copy_panel(const MatrixView<const T>& matrix, int64_t sample, int64_t samples, int64_t first,
                int64_t width, T* panel) {
  constexpr int kFull = kLanes<T>, kHalf = kFull / 2;
  const int64_t stride = matrix.row_stride, remaining = matrix.cols - first;
  const T* source = matrix.data + sample * stride + first;
  if (width == kFull && remaining >= kFull)
    return copy_columns<T, kFull>(source, stride, samples, panel);
  if (width == kHalf && remaining >= kHalf)
    return copy_columns<T, kHalf>(source, stride, samples, panel);
  const int64_t count = width < remaining ? width : remaining;
  for (int64_t n = 0; n < samples; ++n, source += stride, panel += width) {
    int64_t i = 0;
    for (; i + kRun <= count; i += kRun) store(panel + i, load<Vec<T, kRun>>(source + i));
    for (; i < count; ++i) panel[i] = source[i];
    for (; i < width; ++i) panel[i] = T{};
  }
}

// Columns [first, first + blocks * block) of a tile's samples, each block cut into panels of
// `widest` columns, the last narrower; the panel that begins at column c is at
// panels + (c - first) * samples. Eight samples at a time: all of one sample would spread its
// writes, all of one panel would come back to each row once for each cache line (3072 outputs,
// 512 samples: 0.3 for 0.8 ns an element).
template <class T>
void copy_panels(const MatrixView<const T>& matrix, int64_t sample, int64_t samples, int64_t first,
                 int64_t blocks, int64_t block, int64_t widest, T* panels) {
  for (int64_t n = 0; n < samples; n += kSamplesTogether) {
    const int64_t together = n + kSamplesTogether < samples ? kSamplesTogether : samples - n;
    for (int64_t begin = 0; begin < blocks * block; begin += block) {
      for (int64_t i = 0; i < block; i += widest) {
        const int64_t width = i + widest < block ? widest : block - i;
        copy_panel(matrix, sample + n, together, first + begin + i, width,
                   panels + (begin + i) * samples + n * width);
      }
    }
  }
}

// Block rows whose output gradients are copied at once: 64 outputs are four cache lines of a
// sample.
int64_t rows_together(int64_t rows) { return rows < 64 ? 64 / rows : 1; }

// Elements of scratch that hold one offset for each column, in whole cache lines.
template <class T>
int64_t offsets_size(int64_t columns) {
  return (columns * int64_t{sizeof(int64_t)} + 63) / 64 * (64 / int64_t{sizeof(T)});
}

// Sets the padding of block k of block row `row` to zero: a product of zero and an infinite or NaN
// gradient is not.
template <class T>
void clear_padding(const BlockSparseLinearWeightGradientArgs<T>& args, int64_t row, int64_t k) {
  T* block = args.grad_values + k * args.rows * args.cols;
  const int64_t columns = args.input.cols - args.col_indices[k] * args.cols;
  const int64_t rows = args.grad_output.cols - row * args.rows;
  for (int64_t c = 0; c < args.cols; ++c) {
    for (int64_t r = c < columns ? rows : 0; r < args.rows; ++r) block[c * args.rows + r] = T{};
  }
}

}  // namespace

template <class T>
BlockSparseLinearWeightGradientWork plan_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientArgs<T>& args) {
  // The input panels leave room in a second-level cache of 512 KiB, unless so few samples would be
  // left of a tile that its register tiles are hardly worth their loads and stores.
  constexpr int64_t kPanelBytes = 384 * 1024;
  const int64_t padded_features = (args.input.cols + args.cols - 1) / args.cols * args.cols;
  int64_t samples = kPanelBytes / static_cast<int64_t>(sizeof(T)) / (padded_features + 1);
  if (samples < 64) samples = 64;
  if (samples > 128) samples = 128;
  // Tiles of equal length: a short last one would cost as many loads and stores as a long one.
  const int64_t tiles = (args.input.rows + samples - 1) / samples;
  if (tiles > 0) samples = (args.input.rows + tiles - 1) / tiles;
  BlockSparseLinearWeightGradientWork work;
  work.samples_per_tile = samples;
  work.total = args.crow_indices[args.block_rows];
  work.scratch_size = offsets_size<T>(padded_features) +
                      samples * (rows_together(args.rows) * args.rows + padded_features);
  return work;
}

template <class T>
void block_sparse_linear_weight_gradient(const BlockSparseLinearWeightGradientArgs<T>& args,
                                         const BlockSparseLinearWeightGradientWork& work,
                                         int64_t begin, int64_t end, T* scratch) {
  const int64_t block_cols = (args.input.cols + args.cols - 1) / args.cols;
  const int64_t run = args.cols % kRun == 0 ? kRun : 1;
  // A panel no wider than a cache line holds what 16 columns read, and nothing else.
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t panel_cols = args.cols % kLine == 0 ? kLine : args.cols;
  auto* offsets = reinterpret_cast<int64_t*>(scratch);
  T* grads = scratch + offsets_size<T>(block_cols * args.cols);
  const int64_t together = rows_together(args.rows);
  T* panels = grads + work.samples_per_tile * together * args.rows;
  int64_t first_row = 0;
  while (args.crow_indices[first_row + 1] <= begin) ++first_row;

  for (int64_t sample = 0; sample < args.input.rows; sample += work.samples_per_tile) {
    const int64_t remaining = args.input.rows - sample;
    const int64_t samples = work.samples_per_tile < remaining ? work.samples_per_tile : remaining;
    if (args.cols == 1) {
      transpose(args.input.data + sample * args.input.row_stride, args.input.row_stride, samples,
                args.input.cols, panels, samples);
    } else {
      copy_panels(args.input, sample, samples, 0, block_cols, args.cols, panel_cols, panels);
    }
    int64_t first_copied = 0, copied_rows = 0;  // the block rows whose gradients are at hand
    for (int64_t row = first_row; row < args.block_rows && args.crow_indices[row] < end; ++row) {
      const int64_t first = args.crow_indices[row] > begin ? args.crow_indices[row] : begin;
      const int64_t last = args.crow_indices[row + 1] < end ? args.crow_indices[row + 1] : end;
      if (first >= last) continue;
      if (row >= copied_rows) {
        first_copied = row;
        copied_rows = row + together < args.block_rows ? row + together : args.block_rows;
        copy_panels(args.grad_output, sample, samples, row * args.rows, copied_rows - row,
                    args.rows, int64_t{kLanes<T>}, grads);
      }
      int64_t runs = 0;
      for (int64_t k = first; k < last; ++k) {
        for (int64_t c = 0; c < args.cols; c += run) {
          const int64_t column = args.col_indices[k] * args.cols + c;
          offsets[runs++] = (column - column % panel_cols) * samples + column % panel_cols;
        }
      }
      const RowTile<T> tile = {{panels, offsets, panel_cols},
                               grads + (row - first_copied) * args.rows * samples,
                               args.rows,
                               samples,
                               sample == 0};
      const auto add = run == kRun ? add_rows<T, kRun> : add_rows<T, 1>;
      add(tile, (last - first) * args.cols, 0, args.grad_values + first * args.cols * args.rows);
    }
  }

  for (int64_t row = first_row; row < args.block_rows && args.crow_indices[row] < end; ++row) {
    const bool padded = (row + 1) * args.rows > args.grad_output.cols;
    for (int64_t k = args.crow_indices[row]; k < args.crow_indices[row + 1]; ++k) {
      if (k < begin || k >= end) continue;
      if (padded || (args.col_indices[k] + 1) * args.cols > args.input.cols) {
        clear_padding(args, row, k);
      }
    }
  }
}

template BlockSparseLinearWeightGradientWork plan_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientArgs<float>&);
template BlockSparseLinearWeightGradientWork plan_block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientArgs<double>&);
template void block_sparse_linear_weight_gradient(const BlockSparseLinearWeightGradientArgs<float>&,
                                                  const BlockSparseLinearWeightGradientWork&,
                                                  int64_t, int64_t, float*);
template void block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientArgs<double>&, const BlockSparseLinearWeightGradientWork&,
    int64_t, int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
