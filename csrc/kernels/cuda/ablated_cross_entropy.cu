// ablated_cross_entropy in float32 on CUDA; formula and contract are in
// ../ablated_cross_entropy.h.
//
// One warp computes one piece over one span of samples, 128 at a time, four in each lane:
//
//                    weight panel: columns of the piece x 4 classes
//                   +-----------+
//                   |  4 x 4    |   a lane holds the losses of 4 classes x 4 samples, reads for
//   hidden panel:   |  losses   |   each column 4 hidden units and 4 weights as one 16-byte load
//   columns x 128   |  of a     |   each, and does 16 multiply-adds; the weights are the same for
//   samples         |  lane     |   all lanes. Then come the exponentials of these 16.
//                   +-----------+
//
// Four neighbouring pieces share a thread block, whose cache then holds the hidden units and
// probabilities of their samples. Warps share nothing else: there is no barrier.
#include "ablated_cross_entropy.h"

#include "ablated_cross_entropy_plan.h"
#include "cross_entropy_delta.cuh"
#include "loss_panels.h"

namespace fastprune {

extern "C" __global__ void __launch_bounds__(kLossWarps * 32)
    ablated_cross_entropy_f32(const AblatedCrossEntropyCudaArgs args) {
  const auto& call = args.call;
  const auto lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto groups = static_cast<uint32_t>((call.num_pieces + kLossWarps - 1) / kLossWarps);
  const int64_t index =
      int64_t{blockIdx.x % groups} * kLossWarps + static_cast<int>(threadIdx.x) / kLanes;
  const int64_t span = blockIdx.x / groups;
  if (index >= call.num_pieces) return;
  const int64_t samples = call.logits.rows, padded_samples = padded_size(samples, kWarpSamples);
  const int64_t padded_classes = padded_size(call.logits.cols, kQuad);

  Piece piece;
  const bool known = read_piece(call.pieces, index, call.weight.rows, call.weight.cols, piece);
  double total = known ? 0.0 : NAN;
  if (known && piece.row_begin < piece.row_end && piece.col_begin < piece.col_end) {
    const Softmax softmax = {call.logits, args.probability, args.log_sum_exp};
    const int64_t end = min((span + 1) * call.span, padded_samples);
    for (int64_t first = span * call.span; first < end; first += kWarpSamples) {
      const int64_t sample = first + lane * kLaneSamples;
      const PanelLosses losses = {args.hidden_panel + piece.col_begin * padded_samples + sample,
                                  padded_samples,
                                  args.weight_panel + piece.col_begin * padded_classes,
                                  padded_classes,
                                  piece.col_end - piece.col_begin,
                                  piece.row_begin,
                                  piece.row_end};
      total += weighted_deltas(
          softmax, losses,
          read_samples(sample, call.targets, call.sample_weight, samples, call.logits.cols));
    }
  }
  total = sum_of_warp(total);
  if (lane == 0) call.partial_sums[span * call.num_pieces + index] = total;
}

cudaError_t launch_ablated_cross_entropy(const AblatedCrossEntropyCudaArgs& args,
                                         cudaStream_t stream) {
  const auto& call = args.call;
  const auto plan = plan_ablated_cross_entropy_cuda(call.logits.rows, call.hidden.cols,
                                                    call.logits.cols, call.num_pieces);
  if (!plan) return cudaErrorInvalidConfiguration;
  if (plan->launch.grid[0] == 0) return cudaSuccess;
  cudaError_t status =
      launch_softmax_panel({call.logits, args.probability, args.log_sum_exp}, stream);
  if (status != cudaSuccess) return status;
  status = launch_transpose_to_panel(call.hidden, args.hidden_panel, kWarpSamples, stream);
  if (status != cudaSuccess) return status;
  status = launch_transpose_to_panel(call.weight, args.weight_panel, kQuad, stream);
  if (status != cudaSuccess) return status;
  ablated_cross_entropy_f32<<<plan->launch.grid[0], plan->launch.block[0],
                              plan->launch.shared_bytes, stream>>>(args);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  return launch_sum_spans({call.partial_sums, plan->grid.spans, call.num_pieces, args.delta_sum},
                          stream);
}

}  // namespace fastprune
