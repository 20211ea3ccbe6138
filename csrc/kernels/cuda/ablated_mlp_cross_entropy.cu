// ablated_mlp_cross_entropy in float32 on CUDA; formula and contract are in
// ../ablated_mlp_cross_entropy.h.
//
// One warp computes one piece over one span of samples, 128 at a time, four in each lane. Every
// product is one of panels, 4 rows x 4 samples in a lane's registers (cross_entropy_delta.cuh):
//
//   u          = first weight x inputs of the piece's columns, four units at a time
//   difference = f(z) - f(z - u), into shared memory
//   d          = second weight x differences, four classes at a time
//   sum       += p (exp(d_t - d) - 1)
//
// Up to 32 units of a piece stay in shared memory, and no d is stored. Pieces of more units go
// through it in chunks of 16, which add to the d of 16 classes beside them; where there are more
// classes, the chunks are computed anew for each 16. Lanes touch only their own samples: shared
// memory is an array that a register cannot be, and there is no barrier.
#include "ablated_mlp_cross_entropy.h"

#include "ablated_mlp_cross_entropy_plan.h"
#include "activation_difference.cuh"
#include "cross_entropy_delta.cuh"
#include "loss_panels.h"

namespace fastprune {
namespace {

__device__ inline void store_four(float* target, const float (&values)[4]) {
  *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
}

// What one piece masks of the first layer, for the samples of a lane.
template <Activation activation>
struct HiddenUnits {
  const float* input;  // panels, from the piece's first column on
  const float* weight;
  const float* pre_activation;
  int64_t samples_stride, hidden_stride;
  int cols;

  // The differences of units [begin, end) to slots[unit - begin].
  __device__ void find_differences(int begin, int end, float* slots) const {
    for (int quad = begin / kQuad * kQuad; quad < end; quad += kQuad) {
      float taken[kQuad][kLaneSamples] = {};
      add_products(input, samples_stride, weight + quad, hidden_stride, cols, taken);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (quad + i >= begin && quad + i < end) {
          store_four(slots + (quad + i - begin) * kWarpSamples, taken[i]);
        }
      }
    }
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      float* slot = slots + (unit - begin) * kWarpSamples;
      float z[kLaneSamples], u[kLaneSamples];
      load_four(pre_activation + unit * samples_stride, z);
      load_four(slot, u);
#pragma unroll
      for (int s = 0; s < kLaneSamples; ++s) u[s] = activation_difference<activation>(z[s], u[s]);
      store_four(slot, u);
    }
  }
};

// What a piece of more units than there are slots takes from the logits.
template <Activation activation>
struct ChunkedLosses {
  static constexpr int class_begin = 0;
  HiddenUnits<activation> units;
  const float* weight;  // [hidden][weight_stride], of all units
  int64_t weight_stride;
  int unit_begin, unit_end, class_end;
  float* slots;  // kMlpChunkUnits of differences, then kMlpPanelClasses of losses

  __device__ void find_targets(const int (&targets)[kLaneSamples],
                               float (&losses)[kLaneSamples]) const {
#pragma unroll
    for (int s = 0; s < kLaneSamples; ++s) losses[s] = 0.0f;
    for (int begin = unit_begin; begin < unit_end; begin += kMlpChunkUnits) {
      const int end = min(begin + kMlpChunkUnits, unit_end);
      units.find_differences(begin, end, slots);
      add_target_products(slots, kWarpSamples, weight + begin * weight_stride, weight_stride,
                          end - begin, targets, losses);
    }
  }

  template <class Use>
  __device__ void visit(const Use& use) const {
    float* panel = slots + kMlpChunkUnits * kWarpSamples;
    for (int first = 0; first < class_end; first += kMlpPanelClasses) {
      const int last = min(first + kMlpPanelClasses, class_end);
      for (int begin = unit_begin; begin < unit_end; begin += kMlpChunkUnits) {
        const int end = min(begin + kMlpChunkUnits, unit_end);
        units.find_differences(begin, end, slots);
        for (int quad = first; quad < last; quad += kQuad) {
          float* sums = panel + (quad - first) * kWarpSamples;
          float losses[kQuad][kLaneSamples] = {};
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            if (begin != unit_begin) load_four(sums + i * kWarpSamples, losses[i]);
          }
          add_products(slots, kWarpSamples, weight + begin * weight_stride + quad, weight_stride,
                       end - begin, losses);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) store_four(sums + i * kWarpSamples, losses[i]);
        }
      }
      for (int c = first; c < last; ++c) {
        float losses[kLaneSamples];
        load_four(panel + (c - first) * kWarpSamples, losses);
        use(c, losses);
      }
    }
  }
};

template <Activation activation>
__device__ __forceinline__ void ablate(const AblatedMlpCrossEntropyCudaArgs& args) {
  __shared__ alignas(16) float memory[kMlpWarps][kMlpSlots][kWarpSamples];
  const auto& call = args.call;
  const auto lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto warp = static_cast<int>(threadIdx.x) / kLanes;
  const auto groups = static_cast<uint32_t>((call.num_pieces + kMlpWarps - 1) / kMlpWarps);
  const int64_t index = int64_t{blockIdx.x % groups} * kMlpWarps + warp;
  const int64_t span = blockIdx.x / groups;
  if (index >= call.num_pieces) return;
  const int64_t samples = call.logits.rows, padded_samples = padded_size(samples, kWarpSamples);
  const int64_t padded_hidden = padded_size(call.first_weight.rows, kQuad);
  const int64_t padded_classes = padded_size(call.logits.cols, kQuad);
  const auto classes = static_cast<int>(call.logits.cols);
  float* slots = &memory[warp][0][lane * kLaneSamples];

  Piece piece;
  const bool known =
      read_piece(call.pieces, index, call.first_weight.rows, call.first_weight.cols, piece);
  double total = known ? 0.0 : NAN;
  if (known && piece.row_begin < piece.row_end && piece.col_begin < piece.col_end) {
    const Softmax softmax = {call.logits, args.probability, args.log_sum_exp};
    const int64_t end = min((span + 1) * call.span, padded_samples);
    for (int64_t first = span * call.span; first < end; first += kWarpSamples) {
      const int64_t sample = first + lane * kLaneSamples;
      const HiddenUnits<activation> units = {
          args.input_panel + piece.col_begin * padded_samples + sample,
          args.first_weight_panel + piece.col_begin * padded_hidden,
          args.pre_activation_panel + sample,
          padded_samples,
          padded_hidden,
          piece.col_end - piece.col_begin};
      const LaneSamples lane_samples =
          read_samples(sample, call.targets, call.sample_weight, samples, call.logits.cols);
      if (piece.row_end - piece.row_begin <= kMlpSlots) {
        units.find_differences(piece.row_begin, piece.row_end, slots);
        const PanelLosses losses = {slots,
                                    kWarpSamples,
                                    args.second_weight_panel + piece.row_begin * padded_classes,
                                    padded_classes,
                                    piece.row_end - piece.row_begin,
                                    0,
                                    classes};
        total += weighted_deltas(softmax, losses, lane_samples);
      } else {
        const ChunkedLosses<activation> losses = {units,          args.second_weight_panel,
                                                  padded_classes, piece.row_begin,
                                                  piece.row_end,  classes,
                                                  slots};
        total += weighted_deltas(softmax, losses, lane_samples);
      }
    }
  }
  total = sum_of_warp(total);
  if (lane == 0) call.partial_sums[span * call.num_pieces + index] = total;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kMlpWarps * 32)
    ablated_mlp_cross_entropy_none_f32(const AblatedMlpCrossEntropyCudaArgs args) {
  ablate<Activation::kNone>(args);
}
extern "C" __global__ void __launch_bounds__(kMlpWarps * 32)
    ablated_mlp_cross_entropy_relu_f32(const AblatedMlpCrossEntropyCudaArgs args) {
  ablate<Activation::kRelu>(args);
}
extern "C" __global__ void __launch_bounds__(kMlpWarps * 32)
    ablated_mlp_cross_entropy_gelu_f32(const AblatedMlpCrossEntropyCudaArgs args) {
  ablate<Activation::kGelu>(args);
}
extern "C" __global__ void __launch_bounds__(kMlpWarps * 32)
    ablated_mlp_cross_entropy_gelu_tanh_f32(const AblatedMlpCrossEntropyCudaArgs args) {
  ablate<Activation::kGeluTanh>(args);
}
extern "C" __global__ void __launch_bounds__(kMlpWarps * 32)
    ablated_mlp_cross_entropy_silu_f32(const AblatedMlpCrossEntropyCudaArgs args) {
  ablate<Activation::kSilu>(args);
}

cudaError_t launch_ablated_mlp_cross_entropy(const AblatedMlpCrossEntropyCudaArgs& args,
                                             cudaStream_t stream) {
  using Kernel = void (*)(AblatedMlpCrossEntropyCudaArgs);
  static constexpr Kernel kKernels[] = {
      ablated_mlp_cross_entropy_none_f32, ablated_mlp_cross_entropy_relu_f32,
      ablated_mlp_cross_entropy_gelu_f32, ablated_mlp_cross_entropy_gelu_tanh_f32,
      ablated_mlp_cross_entropy_silu_f32};
  const auto& call = args.call;
  const auto activation = static_cast<int32_t>(call.activation);
  const auto plan = plan_ablated_mlp_cross_entropy_cuda({call.logits.rows, call.input.cols,
                                                         call.pre_activation.cols, call.logits.cols,
                                                         call.num_pieces, activation});
  if (!plan) return cudaErrorInvalidConfiguration;
  if (plan->launch.grid[0] == 0) return cudaSuccess;
  cudaError_t status =
      launch_softmax_panel({call.logits, args.probability, args.log_sum_exp}, stream);
  const auto transpose = [&](const MatrixView<const float>& source, float* panel,
                             int64_t multiple) {
    if (status == cudaSuccess) status = launch_transpose_to_panel(source, panel, multiple, stream);
  };
  transpose(call.input, args.input_panel, kWarpSamples);
  transpose(call.pre_activation, args.pre_activation_panel, kWarpSamples);
  transpose(call.first_weight, args.first_weight_panel, kQuad);
  transpose(call.second_weight, args.second_weight_panel, kQuad);
  if (status != cudaSuccess) return status;
  kKernels[activation]<<<plan->launch.grid[0], plan->launch.block[0], plan->launch.shared_bytes,
                         stream>>>(args);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  return launch_sum_spans({call.partial_sums, plan->grid.spans, call.num_pieces, args.delta_sum},
                          stream);
}

}  // namespace fastprune
