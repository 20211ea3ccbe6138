// The weight gradient of block_sparse_linear on the CPU; the contract is in
// ../block_sparse_linear_weight_gradient.h.
//
// A tile of samples is copied to panels: one of the inputs for each block column,
// [samples][cols], which stay in the second-level cache, and one of the output gradients for the block
// row at hand, [samples][rows]. All columns of a block row's kept blocks lie one after the other
// in the packed gradient; C of them at a time, across blocks, form a register tile:
//
//               rows: V vectors
//             +------+------+
//   column 0  | acc  | acc  |   for each sample of the tile:
//     ...     |      |      |     load V vectors of output gradients
//   column C-1  acc  | acc  |     for each column: acc += broadcast(input) * vectors
//             +------+------+
#include "../block_sparse_linear_weight_gradient.h"

#include "vec.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kWideColumns = 8;  // x 2 vectors of rows
#else
constexpr int kWideColumns = 4;
#endif
constexpr int kColumns = 8;  // x 1 vector

// Where the columns of one block row lie in the input panels.
template <class T>
struct PanelColumns {
  const T* panels;
  const int32_t* col_indices;
  int64_t panel_stride;
  int64_t cols;

  // Column `index`, counted over all kept blocks.
  const T* at(int64_t index) const {
    return panels + col_indices[index / cols] * panel_stride + index % cols;
  }
};

// Adds the products of `samples` samples for columns [column, column + Columns) and
// Vectors * Lanes rows. `Run` columns that begin at a multiple of Run lie side by side in a panel.
template <class T, int Lanes, int Vectors, int Columns, int Run>
__attribute__((noinline)) void add_products(const PanelColumns<T>& inputs, int64_t column,
                                            const T* grads, int64_t rows, int64_t samples,
                                            bool first_tile, T* target) {
  using V = Vec<T, Lanes>;
  constexpr int kRun = Run < Columns ? Run : Columns;
  const T* x[Columns / kRun];
  for (int i = 0; i < Columns / kRun; ++i) x[i] = inputs.at(column + i * kRun);
  const int64_t step = inputs.cols;
  V acc[Columns][Vectors];
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      acc[c][v] = first_tile ? V{} : load<V>(target + c * rows + v * Lanes);
    }
  }
  for (int64_t n = 0, offset = 0; n < samples; ++n, offset += step, grads += rows) {
    V values[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) values[v] = load<V>(grads + v * Lanes);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      const V input = broadcast<V>(x[c / kRun][c % kRun + offset]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[c][v] += input * values[v];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(target + c * rows + v * Lanes, acc[c][v]);
  }
}

// Columns [begin, end) of a block row, for Vectors * Lanes rows, in ever narrower register tiles.
template <class T, int Lanes, int Vectors, int Columns, int Run>
void add_columns(const PanelColumns<T>& inputs, int64_t begin, int64_t end, const T* grads,
                 int64_t rows, int64_t samples, bool first_tile, T* target) {
  for (; begin + Columns <= end; begin += Columns) {
    add_products<T, Lanes, Vectors, Columns, Run>(inputs, begin, grads, rows, samples, first_tile,
                                                  target + begin * rows);
  }
  if constexpr (Columns > 1) {
    if (begin < end) {
      add_columns<T, Lanes, Vectors, Columns / 2, Run>(inputs, begin, end, grads, rows, samples,
                                                       first_tile, target);
    }
  }
}

// All rows of a block row, from `row` on, in ever narrower vectors.
template <class T, int Lanes, int Run>
void add_rows(const PanelColumns<T>& inputs, int64_t begin, int64_t end, int64_t row,
              const T* grads, int64_t rows, int64_t samples, bool first_tile, T* target) {
  if constexpr (Lanes == kLanes<T>) {
    for (; row + 2 * Lanes <= rows; row += 2 * Lanes) {
      add_columns<T, Lanes, 2, kWideColumns, Run>(inputs, begin, end, grads + row, rows, samples,
                                                  first_tile, target + row);
    }
  }
  for (; row + Lanes <= rows; row += Lanes) {
    add_columns<T, Lanes, 1, kColumns, Run>(inputs, begin, end, grads + row, rows, samples,
                                            first_tile, target + row);
  }
  if constexpr (Lanes > 1) {
    if (row < rows) {
      add_rows<T, Lanes / 2, Run>(inputs, begin, end, row, grads, rows, samples, first_tile,
                                  target);
    }
  }
}

// panel[n][i] = matrix[sample + n, first + i], zeros past the matrix.
template <class T>
void copy_panel(const MatrixView<const T>& matrix, int64_t sample, int64_t samples, int64_t first,
                int64_t width, T* panel) {
  const int64_t remaining = matrix.cols - first;
  const int64_t count = width < remaining ? width : remaining;
  for (int64_t n = 0; n < samples; ++n) {
    const T* source = matrix.data + (sample + n) * matrix.row_stride + first;
    for (int64_t i = 0; i < count; ++i) panel[n * width + i] = source[i];
    for (int64_t i = count; i < width; ++i) panel[n * width + i] = T{};
  }
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
  // The input panels take half of a second-level cache of 512 KiB.
  constexpr int64_t kPanelBytes = 256 * 1024;
  const int64_t padded_features = (args.input.cols + args.cols - 1) / args.cols * args.cols;
  int64_t samples = kPanelBytes / static_cast<int64_t>(sizeof(T)) / (padded_features + 1);
  if (samples < 32) samples = 32;
  if (samples > 128) samples = 128;
  if (samples > args.input.rows) samples = args.input.rows;
  BlockSparseLinearWeightGradientWork work;
  work.samples_per_tile = samples;
  work.total = args.crow_indices[args.block_rows];
  work.scratch_size = samples * (padded_features + args.rows);
  return work;
}

template <class T>
void block_sparse_linear_weight_gradient(const BlockSparseLinearWeightGradientArgs<T>& args,
                                         const BlockSparseLinearWeightGradientWork& work,
                                         int64_t begin, int64_t end, T* scratch) {
  const int64_t block_cols = (args.input.cols + args.cols - 1) / args.cols;
  T* grads = scratch;
  T* panels = scratch + work.samples_per_tile * args.rows;
  int64_t first_row = 0;
  while (args.crow_indices[first_row + 1] <= begin) ++first_row;

  for (int64_t sample = 0; sample < args.input.rows; sample += work.samples_per_tile) {
    const int64_t remaining = args.input.rows - sample;
    const int64_t samples = work.samples_per_tile < remaining ? work.samples_per_tile : remaining;
    const PanelColumns<T> inputs = {panels, args.col_indices, samples * args.cols, args.cols};
    for (int64_t c = 0; c < block_cols; ++c) {
      copy_panel(args.input, sample, samples, c * args.cols, args.cols,
                 panels + c * inputs.panel_stride);
    }
    for (int64_t row = first_row; row < args.block_rows && args.crow_indices[row] < end; ++row) {
      const int64_t first = args.crow_indices[row] > begin ? args.crow_indices[row] : begin;
      const int64_t last = args.crow_indices[row + 1] < end ? args.crow_indices[row + 1] : end;
      if (first >= last) continue;
      copy_panel(args.grad_output, sample, samples, row * args.rows, args.rows, grads);
      constexpr int kRun = 4;
      const auto add =
          args.cols % kRun == 0 ? add_rows<T, kLanes<T>, kRun> : add_rows<T, kLanes<T>, 1>;
      add(inputs, first * args.cols, last * args.cols, 0, grads, args.rows, samples, sample == 0,
          args.grad_values);
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
template void block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientArgs<float>&, const BlockSparseLinearWeightGradientWork&,
    int64_t, int64_t, float*);
template void block_sparse_linear_weight_gradient(
    const BlockSparseLinearWeightGradientArgs<double>&,
    const BlockSparseLinearWeightGradientWork&, int64_t, int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
