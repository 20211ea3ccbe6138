// ablate_linear in float32 on CUDA; formula and contract are in ../ablate_linear.h.
//
// One thread block computes 64 samples x 64 outputs for one piece. Where the piece has rows among
// these outputs, it walks the piece's columns, 16 at a time, through shared memory:
//
//                          weights: 16 x 64
//                         +-----------------+   256 threads, 16 along the outputs and 16 along
//                         | [column][row]   |   the samples: thread (x, y) holds the sums of
//   inputs: 64 x 16       +-----------------+   outputs 4x to 4x + 3 and of samples 4y to 4y + 3.
//   [column][sample]      | 4 x 4 of each   |   For each column it reads 4 inputs and 4 weights,
//                         | thread          |   as one 16-byte load each, for 16 multiply-adds.
//                         +-----------------+
//
// Other tiles are copied. Every sum is one chain of fused multiply-adds in the order of the
// columns, subtracted once. The result leaves in 16-byte stores where its rows are aligned to them.
#include "ablate_linear.h"

#include "ablate_linear_plan.h"

namespace fastprune {
namespace {

constexpr int kFour = 4;
constexpr int kAlong = kAblateTile / kFour;  // threads along the outputs, and along the samples
constexpr int kPad = 4;                      // keeps rows aligned to 16 bytes, in other banks
static_assert(kAlong * kAlong == kAblateThreads);
static_assert(kAblateThreads % kAblateColumns == 0);

// tile[column][row] of rows [first, first + 64) and columns [begin, begin + 16); 0 past the ends.
__device__ inline void load_tile(const MatrixView<const float>& matrix, int64_t first,
                                 int64_t row_end, int begin, int col_end,
                                 float (&tile)[kAblateColumns][kAblateTile + kPad]) {
  const int column = static_cast<int>(threadIdx.x) % kAblateColumns;
#pragma unroll
  for (int i = 0; i < kAblateTile; i += kAblateThreads / kAblateColumns) {
    const int row = static_cast<int>(threadIdx.x) / kAblateColumns + i;
    const bool inside = first + row < row_end && begin + column < col_end;
    tile[column][row] =
        inside ? matrix.data[(first + row) * matrix.row_stride + begin + column] : 0.0f;
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kAblateThreads)
    ablate_linear_f32(const AblateLinearArgs<float> args) {
  __shared__ alignas(16) float inputs[kAblateColumns][kAblateTile + kPad];
  __shared__ alignas(16) float weights[kAblateColumns][kAblateTile + kPad];
  const int64_t samples = args.output.rows;
  const auto outputs = static_cast<int>(args.output.cols);
  const auto output_tiles = static_cast<uint32_t>((outputs + kAblateTile - 1) / kAblateTile);
  // Pieces innermost: neighbouring thread blocks share the outputs that they copy.
  const auto num_pieces = static_cast<uint32_t>(args.num_pieces);
  const uint32_t piece = blockIdx.x % num_pieces, tile = blockIdx.x / num_pieces;
  const int first_output = static_cast<int>(tile % output_tiles) * kAblateTile;
  const int64_t first_sample = int64_t{tile / output_tiles} * kAblateTile;
  const int32_t* bounds = args.pieces + int64_t{piece} * 4;
  int row_begin = bounds[0], row_end = bounds[1], col_begin = bounds[2], col_end = bounds[3];
  // A piece out of range takes NaN from every output, and reads nothing.
  float start = 0.0f;
  if (row_begin < 0 || row_begin > row_end || row_end > outputs || col_begin < 0 ||
      col_begin > col_end || col_end > args.input.cols) {
    row_begin = col_begin = col_end = 0;
    row_end = outputs;
    start = NAN;
  }

  const int x = static_cast<int>(threadIdx.x) % kAlong, y = static_cast<int>(threadIdx.x) / kAlong;
  float sums[kFour][kFour];  // [sample][output]
#pragma unroll
  for (int s = 0; s < kFour; ++s) sums[s][0] = sums[s][1] = sums[s][2] = sums[s][3] = start;
  if (row_begin < first_output + kAblateTile && row_end > first_output) {
    for (int begin = col_begin; begin < col_end; begin += kAblateColumns) {
      load_tile(args.input, first_sample, samples, begin, col_end, inputs);
      load_tile(args.weight, first_output, outputs, begin, col_end, weights);
      __syncthreads();
      const int columns = min(col_end - begin, kAblateColumns);
#pragma unroll 4
      for (int c = 0; c < columns; ++c) {
        const float4 in = *reinterpret_cast<const float4*>(&inputs[c][kFour * y]);
        const float4 w = *reinterpret_cast<const float4*>(&weights[c][kFour * x]);
        const float values[kFour] = {in.x, in.y, in.z, in.w};
#pragma unroll
        for (int s = 0; s < kFour; ++s) {
          sums[s][0] = fmaf(values[s], w.x, sums[s][0]);
          sums[s][1] = fmaf(values[s], w.y, sums[s][1]);
          sums[s][2] = fmaf(values[s], w.z, sums[s][2]);
          sums[s][3] = fmaf(values[s], w.w, sums[s][3]);
        }
      }
      // The next step overwrites the tiles.
      __syncthreads();
    }
  }

  const int output = first_output + kFour * x;
  const bool aligned = outputs % kFour == 0 && reinterpret_cast<uintptr_t>(args.masked) % 16 == 0;
#pragma unroll
  for (int s = 0; s < kFour; ++s) {
    const int64_t sample = first_sample + kFour * y + s;
    if (sample >= samples) continue;
    const float* source = args.output.data + sample * args.output.row_stride + output;
    float* target = args.masked + (int64_t{piece} * samples + sample) * outputs + output;
    float values[kFour];
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      values[i] = 0.0f;
      if (output + i >= outputs) continue;
      const bool masked = output + i >= row_begin && output + i < row_end;
      // Compared, since weights outside the piece may be inf or NaN.
      values[i] = masked ? source[i] - sums[s][i] : source[i];
    }
    if (aligned && output < outputs) {
      *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        if (output + i < outputs) target[i] = values[i];
      }
    }
  }
}

cudaError_t launch_ablate_linear(const AblateLinearArgs<float>& args, cudaStream_t stream) {
  const auto plan =
      plan_ablate_linear_cuda(args.output.rows, args.input.cols, args.output.cols, args.num_pieces);
  if (!plan) return cudaErrorInvalidConfiguration;
  if (plan->grid[0] == 0) return cudaSuccess;
  ablate_linear_f32<<<plan->grid[0], plan->block[0], plan->shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace fastprune
