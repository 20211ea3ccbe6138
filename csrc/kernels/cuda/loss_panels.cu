// Panels for the loss-delta kernels, and the sum of what they leave; see loss_panels.h.
#include "loss_panels.h"

#include "loss_panels_plan.h"

namespace fastprune {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 32;
constexpr int kTransposeRows = kTransposeThreads / kTransposeTile;

// exp(logit - largest), with what the subtraction rounds off (Knuth, The Art of Computer
// Programming 2, 4.2.2, theorem B): it would be a relative error of the difference times float's.
__device__ float exponential(float logit, float largest) {
  const float x = logit - largest;
  const float back = x + largest;
  const float lost = (logit - back) + ((back - x) - largest);
  const float e = expf(x);
  return x < -87.0f ? 0.0f : fmaf(e, lost, e);
}

}  // namespace

// One thread block transposes a tile of 32 x 32.
extern "C" __global__ void __launch_bounds__(kTransposeThreads)
    transpose_to_panel_f32(const TransposeToPanelArgs args) {
  // The odd row length puts a column's elements into different banks.
  __shared__ float tile[kTransposeTile][kTransposeTile + 1];
  const auto col_tiles =
      static_cast<uint32_t>((args.source.cols + kTransposeTile - 1) / kTransposeTile);
  const int64_t first_row = int64_t{blockIdx.x / col_tiles} * kTransposeTile;
  const int64_t first_col = int64_t{blockIdx.x % col_tiles} * kTransposeTile;
  const auto x = static_cast<int>(threadIdx.x) % kTransposeTile;
  const auto y = static_cast<int>(threadIdx.x) / kTransposeTile;
#pragma unroll
  for (int i = 0; i < kTransposeTile; i += kTransposeRows) {
    const int64_t row = first_row + y + i, col = first_col + x;
    const bool inside = row < args.source.rows && col < args.source.cols;
    tile[y + i][x] = inside ? args.source.data[row * args.source.row_stride + col] : 0.0f;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTransposeTile; i += kTransposeRows) {
    const int64_t row = first_row + x, col = first_col + y + i;
    if (row < args.padded_rows && col < args.source.cols) {
      args.panel[col * args.padded_rows + row] = tile[x][y + i];
    }
  }
}

// One warp for each sample.
extern "C" __global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_panel_f32(const SoftmaxPanelArgs args) {
  const auto lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t sample =
      int64_t{blockIdx.x} * (kSoftmaxThreads / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
  const int64_t padded_samples = padded_size(args.logits.rows, kWarpSamples);
  const auto classes = static_cast<int>(args.logits.cols);
  float* probability = args.probability + sample;
  if (sample >= args.logits.rows) {
#pragma unroll 1
    for (int c = lane; c < classes; c += kLanes) probability[c * padded_samples] = 0.0f;
    return;
  }
  const float* logits = args.logits.data + sample * args.logits.row_stride;
  float largest = -INFINITY;
  for (int c = lane; c < classes; c += kLanes) largest = fmaxf(largest, logits[c]);
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, mask));
  }
  double sum = 0.0;
  for (int c = lane; c < classes; c += kLanes) sum += exponential(logits[c], largest);
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
  const auto inverse = static_cast<float>(1.0 / sum);
  for (int c = lane; c < classes; c += kLanes) {
    probability[c * padded_samples] = exponential(logits[c], largest) * inverse;
  }
  if (lane == 0) args.log_sum_exp[sample] = largest + log(sum);
}

// One thread for each piece, in the order of the spans.
extern "C" __global__ void __launch_bounds__(kSumThreads) sum_spans_f64(const SumSpansArgs args) {
  const int64_t piece = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (piece >= args.num_pieces) return;
  double sum = 0.0;
  for (int64_t span = 0; span < args.spans; ++span) {
    sum += args.partial_sums[span * args.num_pieces + piece];
  }
  args.delta_sum[piece] = sum;
}

cudaError_t launch_transpose_to_panel(const MatrixView<const float>& source, float* panel,
                                      int64_t multiple, cudaStream_t stream) {
  const auto plan = plan_transpose_to_panel(source.rows, source.cols, multiple);
  if (!plan) return cudaErrorInvalidConfiguration;
  if (plan->grid[0] == 0) return cudaSuccess;
  transpose_to_panel_f32<<<plan->grid[0], plan->block[0], plan->shared_bytes, stream>>>(
      {source, panel, padded_size(source.rows, multiple)});
  return cudaGetLastError();
}

cudaError_t launch_softmax_panel(const SoftmaxPanelArgs& args, cudaStream_t stream) {
  const auto plan = plan_softmax_panel(args.logits.rows, args.logits.cols);
  if (!plan) return cudaErrorInvalidConfiguration;
  if (plan->grid[0] == 0) return cudaSuccess;
  softmax_panel_f32<<<plan->grid[0], plan->block[0], plan->shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_sum_spans(const SumSpansArgs& args, cudaStream_t stream) {
  const auto plan = plan_sum_spans(args.num_pieces);
  if (!plan) return cudaErrorInvalidConfiguration;
  if (plan->grid[0] == 0) return cudaSuccess;
  sum_spans_f64<<<plan->grid[0], plan->block[0], plan->shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace fastprune
