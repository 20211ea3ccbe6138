// The weight gradient by plain fused multiply-adds: any block size, float32 without tf32, and the
// 16-bit types where the tensor cores do not fit.
//
// A thread block of 128 threads computes 128 kept columns of one block row x R = 16 or 64 of its
// rows, 16 samples at a time:
//
//                    grad_output: 16 x R     R = 16: a thread holds 4 columns x 4 rows;
//                   +------------------+     R = 64: 8 x 8, as four squares of 4 x 4.
//                   | [sample][row]    |
//                   +------------------+     Both tiles are float32, whatever the operands' type,
//   input: 16 x 128 +------------------+     and doubled: while one is multiplied, the next is
//   +-------------+ | grad_values      |     read into registers, and stored to the other.
//   | [sample]    | |  [column][row]   |
//   |    [column] | |        128 x R   |
//   +-------------+ +------------------+
//
// Every sum is one chain of fused multiply-adds in the order of the samples of a slice. Predicted,
// for float32: each sample brings 4 (128 + R) bytes for 256 R operations, 7 for each byte where
// R = 16 and 21 where R = 64; each multiply-add needs 2 bytes of shared memory where R = 16, 1
// where R = 64.
#pragma once

#include "block_sparse_linear_weight_gradient_operands.cuh"

namespace fastprune {

constexpr int kPlainStep = 16;  // samples

template <int kRows>
struct PlainTiles {
  float inputs[kPlainStep][kGradientTileColumns];
  float grads[kPlainStep][kRows];
};

template <class Input, int kRows>
__device__ __forceinline__ void weight_gradient_by_multiply_adds(const typename Input::Args& args,
                                                                 PlainTiles<kRows> (&tiles)[2]) {
  using T = typename Input::Type;
  constexpr int kSquares = kRows == 16 ? 1 : 2;  // in each direction
  constexpr int kThreadsAlongRows = kRows / (4 * kSquares);
  constexpr int kThreadsAlongColumns = kGradientThreads / kThreadsAlongRows;
  static_assert(kThreadsAlongColumns * 4 * kSquares == kGradientTileColumns);
  static_assert(kGradientThreads == kGradientTileColumns);  // a thread loads one column
  constexpr int kGradApart = kGradientThreads / kRows;      // samples that a thread loads

  const auto& gradient = args.gradient;
  const GradientTile tile = find_gradient_tile(gradient);
  if (tile.first_column >= tile.columns) return;
  const GradientSlice slice = gradient_slice(args);
  const auto rows = static_cast<int>(gradient.rows);
  const auto thread = static_cast<int>(threadIdx.x);
  const int first_row = static_cast<int>(blockIdx.y) * kRows;
  const int existing_rows =
      min(rows, static_cast<int>(gradient.grad_output.cols) - tile.first_output);

  typename Input::Column input(args);
  if (const int column = tile.first_column + thread; column < tile.columns) {
    input.start(tile, slice, column);
  }
  const int grad_row = first_row + thread % kRows, grad_sample = thread / kRows;
  const T* grad = nullptr;
  if (grad_row < existing_rows) {
    grad = gradient.grad_output.data +
           (slice.begin + grad_sample) * gradient.grad_output.row_stride + tile.first_output +
           grad_row;
  }

  float next_inputs[kPlainStep], next_grads[kPlainStep / kGradApart];
  const auto load = [&](int begin) {
#pragma unroll
    for (int s = 0; s < kPlainStep; ++s) {
      next_inputs[s] = input.next(begin + s, slice.samples);
    }
#pragma unroll
    for (int i = 0; i < kPlainStep / kGradApart; ++i) {
      const int s = begin + i * kGradApart;
      const bool exists = grad && s + grad_sample < slice.samples;
      next_grads[i] = exists ? to_float(grad[s * gradient.grad_output.row_stride]) : 0.0f;
    }
  };

  const int x = thread % kThreadsAlongRows, y = thread / kThreadsAlongRows;
  float sums[kSquares][4][kSquares][4] = {};
  load(0);
  for (int begin = 0, parity = 0; begin < slice.samples; begin += kPlainStep, parity ^= 1) {
    PlainTiles<kRows>& now = tiles[parity];
#pragma unroll
    for (int s = 0; s < kPlainStep; ++s) now.inputs[s][thread] = next_inputs[s];
#pragma unroll
    for (int i = 0; i < kPlainStep / kGradApart; ++i) {
      now.grads[grad_sample + i * kGradApart][thread % kRows] = next_grads[i];
    }
    // One barrier is enough: who passes it has read the other tile, which is stored to next.
    __syncthreads();
    load(begin + kPlainStep);
#pragma unroll
    for (int s = 0; s < kPlainStep; ++s) {
      float4 columns[kSquares], square_rows[kSquares];
#pragma unroll
      for (int i = 0; i < kSquares; ++i) {
        columns[i] =
            *reinterpret_cast<const float4*>(&now.inputs[s][4 * (y + i * kThreadsAlongColumns)]);
        square_rows[i] =
            *reinterpret_cast<const float4*>(&now.grads[s][4 * (x + i * kThreadsAlongRows)]);
      }
#pragma unroll
      for (int i = 0; i < kSquares; ++i) {
        const float column[4] = {columns[i].x, columns[i].y, columns[i].z, columns[i].w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int j = 0; j < kSquares; ++j) {
            sums[i][c][j][0] = fmaf(column[c], square_rows[j].x, sums[i][c][j][0]);
            sums[i][c][j][1] = fmaf(column[c], square_rows[j].y, sums[i][c][j][1]);
            sums[i][c][j][2] = fmaf(column[c], square_rows[j].z, sums[i][c][j][2]);
            sums[i][c][j][3] = fmaf(column[c], square_rows[j].w, sums[i][c][j][3]);
          }
        }
      }
    }
  }

  const auto store_all = [&](auto* grad_values) {
#pragma unroll
    for (int i = 0; i < kSquares; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = tile.first_column + 4 * (y + i * kThreadsAlongColumns) + c;
        if (column >= tile.columns) continue;
        // Set, not multiplied: a product of a zero in the padding with infinity is NaN.
        const int filled = Input::exists(args, tile, column) ? existing_rows : 0;
        auto* values = grad_values + (int64_t{tile.first_block} * gradient.cols + column) * rows;
#pragma unroll
        for (int j = 0; j < kSquares; ++j) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int row = first_row + 4 * (x + j * kThreadsAlongRows) + r;
            if (row < rows) store(values + row, row < filled ? sums[i][c][j][r] : 0.0f);
          }
        }
      }
    }
  };
  if (args.partial_sums) {
    store_all(args.partial_sums + blockIdx.z * args.size);
  } else {
    store_all(gradient.grad_values);
  }
}

}  // namespace fastprune
