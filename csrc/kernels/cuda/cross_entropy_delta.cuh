// The change of the cross-entropy of four samples in each lane of a warp, from what masking takes
// from their logits: the formula of ../ablated_cross_entropy.h.
//
// A warp walks the masked classes four at a time. For each quad it has 4 classes x 4 samples of
// losses in registers, and adds probability * expm1(target's loss - class's loss) to one sum for
// each sample: no loss is stored, whatever the number of classes. CUDA's expm1f, log1pf and expf
// are within 2 units in the last place (CUDA C++ Programming Guide, "Mathematical Functions"); the
// tests compare with float64.
#pragma once

#include "../types.h"
#include "loss_panels_plan.h"

namespace fastprune {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 32;
constexpr int kLaneSamples = kWarpSamples / kLanes;
static_assert(kLaneSamples == 4 && kQuad == 4, "float4 holds a lane's samples, and a quad");

// Past these, expm1 or log1p could overflow or lose digits: the sample takes the plain formula.
constexpr float kLargestExponent = 60.0f;
constexpr float kSmallestSum = -0.9f;

// What is known of the unmasked logits.
struct Softmax {
  MatrixView<const float> logits;
  const float* probability;   // [classes][padded samples]
  const double* log_sum_exp;  // [samples]
};

struct Piece {
  int row_begin, row_end, col_begin, col_end;
};

// Within rows x cols, or not: reading the pieces to refuse them would make the host wait.
__device__ inline bool read_piece(const int32_t* pieces, int64_t index, int64_t rows, int64_t cols,
                                  Piece& piece) {
  const int32_t* p = pieces + 4 * index;
  piece = {p[0], p[1], p[2], p[3]};
  return 0 <= piece.row_begin && piece.row_begin <= piece.row_end && piece.row_end <= rows &&
         0 <= piece.col_begin && piece.col_begin <= piece.col_end && piece.col_end <= cols;
}

// Four neighbouring samples of a lane.
struct LaneSamples {
  int64_t first;
  int target[kLaneSamples];
  float weight[kLaneSamples];  // 0 where padded, NaN for a target out of range
};

__device__ inline LaneSamples read_samples(int64_t first, const int64_t* targets,
                                           const float* sample_weight, int64_t samples,
                                           int64_t classes) {
  LaneSamples lane = {first, {}, {}};
#pragma unroll
  for (int s = 0; s < kLaneSamples; ++s) {
    if (first + s >= samples) continue;
    const int64_t target = targets[first + s];
    const bool known = target >= 0 && target < classes;
    lane.target[s] = known ? static_cast<int>(target) : 0;
    const float weight = sample_weight ? sample_weight[first + s] : 1.0f;
    lane.weight[s] = known || weight == 0.0f ? weight : NAN;
  }
  return lane;
}

// By comparisons, since a register has no index.
template <class T>
__device__ T of_sample(const T (&values)[kLaneSamples], int s) {
  return s < 2 ? (s == 0 ? values[0] : values[1]) : (s == 2 ? values[2] : values[3]);
}

__device__ inline void load_four(const float* source, float (&values)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(source);
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}

// sums[i][s] += weight[step][i] * panel[step][s] for four rows of a weight and a lane's samples.
__device__ inline void add_products(const float* panel, int64_t panel_stride, const float* weight,
                                    int64_t weight_stride, int steps,
                                    float (&sums)[kQuad][kLaneSamples]) {
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    float values[kLaneSamples], weights[kQuad];
    load_four(panel + step * panel_stride, values);
    load_four(weight + step * weight_stride, weights);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
#pragma unroll
      for (int s = 0; s < kLaneSamples; ++s) sums[i][s] = fmaf(weights[i], values[s], sums[i][s]);
    }
  }
}

// The same for a row of each sample's own.
__device__ inline void add_target_products(const float* panel, int64_t panel_stride,
                                           const float* weight, int64_t weight_stride, int steps,
                                           const int (&rows)[kLaneSamples],
                                           float (&sums)[kLaneSamples]) {
  for (int step = 0; step < steps; ++step) {
    float values[kLaneSamples];
    load_four(panel + step * panel_stride, values);
#pragma unroll
    for (int s = 0; s < kLaneSamples; ++s) {
      sums[s] = fmaf(weight[step * weight_stride + rows[s]], values[s], sums[s]);
    }
  }
}

// What masking takes from the logits of classes [class_begin, class_end), and 0 from the others:
// the products of a panel of values with a panel of weights.
struct PanelLosses {
  const float* panel;  // of the lane's samples
  int64_t panel_stride;
  const float* weight;  // [steps][weight_stride], of all classes
  int64_t weight_stride;
  int steps;
  int class_begin, class_end;

  // The losses of the targets, exactly those that visit() gives for the same class.
  __device__ void find_targets(const int (&targets)[kLaneSamples],
                               float (&losses)[kLaneSamples]) const {
    int rows[kLaneSamples];
    bool masked[kLaneSamples], any = false;
#pragma unroll
    for (int s = 0; s < kLaneSamples; ++s) {
      masked[s] = targets[s] >= class_begin && targets[s] < class_end;
      any = any || masked[s];
      rows[s] = masked[s] ? targets[s] : class_begin;
      losses[s] = 0.0f;
    }
    if (!__any_sync(kAllLanes, any)) return;
    add_target_products(panel, panel_stride, weight, weight_stride, steps, rows, losses);
#pragma unroll
    for (int s = 0; s < kLaneSamples; ++s) losses[s] = masked[s] ? losses[s] : 0.0f;
  }

  // Calls use(class, losses[kLaneSamples]) for each masked class, in order.
  template <class Use>
  __device__ void visit(const Use& use) const {
    for (int quad = class_begin / kQuad * kQuad; quad < class_end; quad += kQuad) {
      float losses[kQuad][kLaneSamples] = {};
      add_products(panel, panel_stride, weight + quad, weight_stride, steps, losses);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (quad + i >= class_begin && quad + i < class_end) use(quad + i, losses[i]);
      }
    }
  }
};

// log(sum of exp), one term at a time.
struct LogSumExp {
  double largest = -INFINITY, sum = 0.0;

  __device__ void add(double value) {
    if (value == -INFINITY) return;
    const double e = exp(-fabs(value - largest));
    sum = value > largest ? sum * e + 1.0 : sum + e;
    largest = value > largest ? value : largest;
  }
  __device__ double result() const { return largest + log(sum); }
};

// The plain formula in double, of sample s of those lanes that need it.
template <class Losses>
__device__ double plain_delta(const Softmax& softmax, const Losses& losses, const LaneSamples& lane,
                              const float (&target_loss)[kLaneSamples], int s, bool needed) {
  const auto classes = static_cast<int>(softmax.logits.cols);
  const int64_t sample = needed ? lane.first + s : 0;
  const float* logits = softmax.logits.data + sample * softmax.logits.row_stride;
  const double log_sum_exp = softmax.log_sum_exp[sample];
  const double target = of_sample(target_loss, s);
  LogSumExp total;
  losses.visit([&](int c, const float (&loss)[kLaneSamples]) {
    total.add(logits[c] - log_sum_exp + (target - of_sample(loss, s)));
  });
#pragma unroll 1
  for (int c = 0; c < classes; ++c) {
    if (c >= losses.class_begin && c < losses.class_end) continue;
    total.add(logits[c] - log_sum_exp + target);
  }
  return total.result();
}

// The probability of classes [begin, end).
__device__ inline void add_probabilities(const float* probability, int64_t stride, int begin,
                                         int end, float (&sums)[kLaneSamples]) {
#pragma unroll 4
  for (int c = begin; c < end; ++c) {
    float p[kLaneSamples];
    load_four(probability + c * stride, p);
#pragma unroll
    for (int s = 0; s < kLaneSamples; ++s) sums[s] += p[s];
  }
}

// The sum of the weighted deltas of a lane's samples. All lanes of a warp call it together.
template <class Losses>
__device__ double weighted_deltas(const Softmax& softmax, const Losses& losses,
                                  const LaneSamples& lane) {
  const int64_t stride = padded_size(softmax.logits.rows, kWarpSamples);
  const float* probability = softmax.probability + lane.first;
  float target_loss[kLaneSamples], sum[kLaneSamples] = {}, largest[kLaneSamples] = {};
  losses.find_targets(lane.target, target_loss);
  const auto add = [&](const float (&p)[kLaneSamples], const float (&exponent)[kLaneSamples]) {
#pragma unroll
    for (int s = 0; s < kLaneSamples; ++s) {
      largest[s] = fmaxf(largest[s], exponent[s]);
      sum[s] = fmaf(p[s], expm1f(exponent[s]), sum[s]);
    }
  };
  losses.visit([&](int c, const float (&loss)[kLaneSamples]) {
    float p[kLaneSamples], exponent[kLaneSamples];
    load_four(probability + c * stride, p);
#pragma unroll
    for (int s = 0; s < kLaneSamples; ++s) exponent[s] = target_loss[s] - loss[s];
    add(p, exponent);
  });
  bool masked_target = false;
#pragma unroll
  for (int s = 0; s < kLaneSamples; ++s) masked_target = masked_target || target_loss[s] != 0.0f;
  if (__any_sync(kAllLanes, masked_target)) {
    // Summed class by class, since 1 - p would lose the digits of a small rest.
    float others[kLaneSamples] = {};
    add_probabilities(probability, stride, 0, losses.class_begin, others);
    add_probabilities(probability, stride, losses.class_end, static_cast<int>(softmax.logits.cols),
                      others);
    add(others, target_loss);
  }

  double total = 0.0;
  unsigned plain = 0;
#pragma unroll
  for (int s = 0; s < kLaneSamples; ++s) {
    if (lane.weight[s] == 0.0f) continue;
    // Comparisons that NaN fails: NaN samples take the plain formula too, and stay NaN.
    const bool safe = largest[s] < kLargestExponent && sum[s] > kSmallestSum;
    if (safe) {
      total += static_cast<double>(lane.weight[s]) * log1pf(sum[s]);
    } else {
      plain |= 1u << s;
    }
  }
#pragma unroll 1
  for (int s = 0; s < kLaneSamples; ++s) {
    const bool needed = plain >> s & 1;
    if (!__any_sync(kAllLanes, needed)) continue;
    const double delta = plain_delta(softmax, losses, lane, target_loss, s, needed);
    if (needed) total += of_sample(lane.weight, s) * delta;
  }
  return total;
}

// The sum of a warp's values, in lane 0.
__device__ inline double sum_of_warp(double value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(kAllLanes, value, offset);
  }
  return value;
}

}  // namespace
}  // namespace fastprune
