// The weight gradient on tensor cores: float16, bfloat16, and float32 rounded to tf32, for blocks
// whose rows and cols are multiples of 16.
//
// A thread block of four warps computes 128 kept columns of one block row x all its rows. The sum
// runs over the samples; both operands hold the samples as rows, and stay so in shared memory:
//
//                      grad_output: S x R           R = 16, 32, 64 or 128, the next above `rows`;
//                     +------------------+          S = 32 samples of 16 bits, 16 of float32, in
//                     | [sample][row]    |          each of 4 stages (3 for R = 128), which
//                     +------------------+          cp.async fills ahead.
//   input: S x 128    +------------------+
//   +--------------+  | grad_values      |          A warp owns 32 columns x R rows (R <= 32), or
//   | [sample]     |  |  [column][row]   |          64 x R / 2. It multiplies input, transposed
//   |    [column]  |  |        128 x R   |          (A), by grad_output (B); for 16 bits ldmatrix
//   +--------------+  +------------------+          transposes both.
//
// With small blocks the columns belong to several kept blocks (8 of 16 x 16), which share one tile
// of grad_output; each input chunk of 16 bytes lies in one block. Predicted, for 16 bits: each
// sample brings 2 (128 + R) bytes for 256 R operations, 14 for each byte where R = 16, 26 for 32,
// 43 for 64, 64 for 128. A dense 128 x 128 tile that skips lost blocks would load 512 bytes for
// 32768 operations x density, fewer for each byte wherever less than 22 % of 16 x 16 blocks stay.
//
// Banks: the 16-byte chunks of a sample are permuted by an exclusive or with its number, so that
// the eight rows of a matrix of ldmatrix, and the float4 of tf32, meet all banks.
//
// tf32 has no transposing load: each thread reads four neighbouring columns (rows) of a sample and
// gives them to four rows (columns) of the fragments, a permutation that the store undoes.
#pragma once

#include "block_sparse_linear_weight_gradient_operands.cuh"

namespace fastprune {

template <class T, int kRows>
struct WarpTile {
  static constexpr int kColumns = kRows < 64 ? 32 : 64;
  static constexpr int kWarpRows = kRows < 64 ? kRows : kRows / 2;
  static constexpr int kWarpsAlongColumns = kGradientTileColumns / kColumns;
  static constexpr int kM = kColumns / 16;  // fragments
  static constexpr int kN = kWarpRows / 8;
  static constexpr int kInputChunks = kGradientTileColumns * sizeof(T) / 16;
  static constexpr int kGradChunks = kRows * sizeof(T) / 16;

  float sums[kM][kN][4] = {};
  int column, row, lane;  // where the warp's part begins in the thread block's

  __device__ __forceinline__ WarpTile() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    column = warp % kWarpsAlongColumns * kColumns;
    row = warp / kWarpsAlongColumns * kWarpRows;
    lane = static_cast<int>(threadIdx.x) % 32;
  }

  __device__ __forceinline__ void multiply_stage(const uint4* inputs, const uint4* grads) {
    constexpr int kDepth = 32 / sizeof(T);  // samples of a fragment
#pragma unroll
    for (int first = 0; first < kGradientStageBytes / static_cast<int>(sizeof(T));
         first += kDepth) {
      uint32_t a[kM][4], b[kN][2];
      if constexpr (sizeof(T) == 2) {
        load_transposed(inputs, grads, first, a, b);
      } else {
        load_rounded(inputs, grads, first, a, b);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply_add<T>(sums[m][n], a[m], b[n]);
      }
    }
  }

  __device__ __forceinline__ void load_transposed(const uint4* inputs, const uint4* grads,
                                                  int first, uint32_t (&a)[kM][4],
                                                  uint32_t (&b)[kN][2]) const {
    const int matrix = lane / 8, input_sample = first + matrix / 2 * 8 + lane % 8,
              grad_sample = first + matrix % 2 * 8 + lane % 8;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      load_matrices_transposed(a[m], inputs + chunk_place<T, kInputChunks>(
                                                  input_sample, column / 8 + 2 * m + matrix % 2));
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t both[4];
      load_matrices_transposed(
          both, grads + chunk_place<T, kGradChunks>(grad_sample, row / 8 + n + matrix / 2));
      b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
    }
  }

  __device__ __forceinline__ void load_rounded(const uint4* inputs, const uint4* grads, int first,
                                               uint32_t (&a)[kM][4], uint32_t (&b)[kN][2]) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int sample = first + 4 * half + t;
#pragma unroll
      for (int m = 0; m < kM; m += 2) {
        const auto four = reinterpret_cast<const float4*>(
            inputs)[chunk_place<T, kInputChunks>(sample, column / 4 + 4 * m + g)];
        a[m][2 * half] = round_to_tf32(four.x), a[m][2 * half + 1] = round_to_tf32(four.y);
        a[m + 1][2 * half] = round_to_tf32(four.z), a[m + 1][2 * half + 1] = round_to_tf32(four.w);
      }
      if constexpr (kN == 2) {
        const auto two = reinterpret_cast<const float2*>(
            grads)[chunk_place<T, kGradChunks>(sample, row / 4 + g / 2) * 2 + g % 2];
        b[0][half] = round_to_tf32(two.x), b[1][half] = round_to_tf32(two.y);
      } else {
#pragma unroll
        for (int n = 0; n < kN; n += 4) {
          const auto four = reinterpret_cast<const float4*>(
              grads)[chunk_place<T, kGradChunks>(sample, row / 4 + 2 * n + g)];
          b[n][half] = round_to_tf32(four.x), b[n + 1][half] = round_to_tf32(four.y);
          b[n + 2][half] = round_to_tf32(four.z), b[n + 3][half] = round_to_tf32(four.w);
        }
      }
    }
  }

  // Of the thread block's tile: the column of a thread's sums[m][..] in one half of the fragment.
  __device__ __forceinline__ int column_of(int m, int half) const {
    const int g = lane / 4;
    return column +
           (sizeof(T) == 2 ? 16 * m + 8 * half + g : 32 * (m / 2) + 4 * g + 2 * (m % 2) + half);
  }

  // The n-th of the thread's pairs of neighbouring rows in that column: the first of the rows, and
  // both sums.
  __device__ __forceinline__ int pair_of(int m, int half, int n, float& first,
                                         float& second) const {
    const int t = lane % 4;
    if constexpr (sizeof(T) == 2) {
      first = sums[m][n][2 * half], second = sums[m][n][2 * half + 1];
      return row + 8 * n + 2 * t;
    } else {
      const int even = n - n % 2, odd = n % 2;
      first = sums[m][even][2 * half + odd], second = sums[m][even + 1][2 * half + odd];
      return row + (kN == 2 ? 4 * t + 2 * odd : 32 * (n / 4) + 8 * t + 4 * odd + even % 4);
    }
  }
};

template <class Input, class T, class Out, int kRows>
__device__ __forceinline__ void store_gradient(const WarpTile<T, kRows>& warp,
                                               const typename Input::Args& args,
                                               const GradientTile& tile, Out* grad_values) {
  using Warp = WarpTile<T, kRows>;
  const auto& gradient = args.gradient;
  const auto rows = static_cast<int>(gradient.rows);
  const int existing_rows = static_cast<int>(gradient.grad_output.cols) - tile.first_output;
#pragma unroll
  for (int m = 0; m < Warp::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = tile.first_column + warp.column_of(m, half);
      if (column >= tile.columns) continue;
      // Set, not multiplied: a product of a zero in the padding with infinity is NaN.
      const int filled = Input::exists(args, tile, column) ? existing_rows : 0;
      Out* values = grad_values + (int64_t{tile.first_block} * gradient.cols + column) * rows;
#pragma unroll
      for (int n = 0; n < Warp::kN; ++n) {
        float first, second;
        const int row = warp.pair_of(m, half, n, first, second);
        // The smaller tiles are as high as their blocks.
        if (kRows <= 32 || row < rows) {
          store_pair(values + row, row < filled ? first : 0.0f, row + 1 < filled ? second : 0.0f);
        }
      }
    }
  }
}

template <class Input, int kRows, bool kAligned>
__device__ __forceinline__ void weight_gradient_on_tensor_cores(const typename Input::Args& args,
                                                                uint4* shared) {
  using T = typename Input::Type;
  constexpr int kStages = kGradientStages<kRows>;
  constexpr int kStageSamples = kGradientStageBytes / sizeof(T);
  using InputCopies = typename Input::template Copies<kAligned>;
  using GradCopies = OperandCopies<T, kRows, kAligned>;
  constexpr int kInputs = kStageSamples * InputCopies::kChunks;
  constexpr int kStage = kInputs + kStageSamples * GradCopies::kChunks;
  static_assert(kStages * kStage * 16 == kGradientSharedBytes<kRows>);

  const auto& gradient = args.gradient;
  const GradientTile tile = find_gradient_tile(gradient);
  if (tile.first_column >= tile.columns) return;
  const GradientSlice slice = gradient_slice(args);

  InputCopies input_copies(args);
  const int column = tile.first_column + input_copies.chunk * InputCopies::kElements;
  if (column < tile.columns) input_copies.start(tile, slice, column);
  GradCopies grad_copies(gradient.grad_output.row_stride);
  grad_copies.start(gradient.grad_output.data, slice.begin,
                    tile.first_output + grad_copies.chunk * GradCopies::kElements,
                    min(gradient.grad_output.cols, tile.first_output + gradient.rows));
  const int steps = (slice.samples + kStageSamples - 1) / kStageSamples;
  const auto copy_step = [&](int step) {
    if (step < steps) {
      uint4* stage = shared + step % kStages * kStage;
      const int samples = slice.samples - step * kStageSamples;
      input_copies.copy(stage, samples);
      grad_copies.copy(stage + kInputs, samples);
    }
    commit_copies();
  };

  WarpTile<T, kRows> warp;
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    // After it all copies of this stage are seen, and the last stage is free to be filled again.
    __syncthreads();
    copy_step(step + kStages - 1);
    const uint4* stage = shared + step % kStages * kStage;
    warp.multiply_stage(stage, stage + kInputs);
  }

  if (args.partial_sums) {
    store_gradient<Input>(warp, args, tile, args.partial_sums + blockIdx.z * args.size);
  } else {
    store_gradient<Input>(warp, args, tile, gradient.grad_values);
  }
}

}  // namespace fastprune
