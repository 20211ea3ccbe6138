// block_product: the grid of work, and the choice between vectors along the samples
// (sample_panels.h) and along the outputs (few_samples.h). The contract is in block_product.h.
#include "block_product.h"

#include "few_samples.h"
#include "list_grid.h"
#include "sample_panels.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// Samples [begin, end) as a problem of their own.
template <class T>
BlockProductArgs<T> samples_of(const BlockProductArgs<T>& args, int64_t begin, int64_t end) {
  BlockProductArgs<T> result = args;
  result.input.rows = result.output.rows = end - begin;
  result.input.data += begin * args.input.row_stride;
  result.output.data += begin * args.output.row_stride;
  return result;
}

// Whether vectors run along the outputs. Along the samples the last vector is partly idle, and
// inputs are transposed; along the outputs a block must be as high as a vector, each of its steps
// is read for six samples only, and with one vector of outputs half of the additions wait for each
// other (docs/kernels.md).
template <class T>
bool in_place(const BlockProductArgs<T>& args) {
  constexpr int64_t kVector = kLanes<T>;
  const BlockLists<T>& weight = args.weight;
  const int64_t samples = args.input.rows, idle = (kVector - samples % kVector) % kVector;
  if (weight.output_stride != 1 || weight.outputs == 1) return false;
  if (weight.outputs < kVector) return samples == 1 || (samples <= 3 && weight.steps > 1);
  if (samples <= kVector / 2) return true;
  if (weight.steps < 4 || weight.outputs % kVector != 0) return false;
  if (weight.outputs == kVector) return 16 * idle > 7 * samples;
  // Two vectors with AVX2; with AVX-512 no more than the 16 samples that were measured.
  constexpr int64_t kAlways = FASTPRUNE_VECTOR_BYTES == 64 ? kVector : 2 * kVector;
  return samples <= kAlways || 8 * idle > samples;
}

}  // namespace

template <class T>
BlockProductWork plan_block_product(const BlockProductArgs<T>& args, int64_t threads) {
  const int64_t samples = args.input.rows;
  constexpr int64_t kVector = kLanes<T>;
  BlockProductWork work;
  work.transposed = !in_place(args);
  work.units = work.transposed ? (samples + kVector - 1) / kVector : samples;
  const int64_t widest = work.transposed ? panel_vectors(args.weight) : work.units;
  work.groups = widest > 0 ? (work.units + widest - 1) / widest : 1;
  if (work.transposed) {
    // A multiple of the threads, so that few panels are transposed by two of them.
    work.groups = (work.groups + threads - 1) / threads * threads;
    if (work.groups > work.units) work.groups = work.units;
  }
  work.stream_output = work.transposed && can_stream(args.output);
  work.total = work.units * cost_per_unit(args.weight);
  work.scratch_size =
      work.transposed ? widest * kVector * (args.input.cols + kStoredOutputs<T>) : 0;
  return work;
}

template <class T>
void block_product(const BlockProductArgs<T>& args, const BlockProductWork& work, int64_t begin,
                   int64_t end, T* scratch) {
  const int64_t unit = work.transposed ? kLanes<T> : 1;
  const auto first_unit = [&](int64_t group) { return group * work.units / work.groups; };
  const auto multiply = [&](int64_t group, int64_t first, int64_t last) {
    const int64_t units = first_unit(group + 1) - first_unit(group);
    const int64_t first_sample = first_unit(group) * unit;
    const int64_t last_sample = first_unit(group + 1) * unit < args.input.rows
                                    ? first_unit(group + 1) * unit
                                    : args.input.rows;
    const BlockProductArgs<T> group_args = samples_of(args, first_sample, last_sample);
    if (work.transposed) {
      multiply_group(group_args, units, work.stream_output, first, last, scratch);
    } else {
      multiply_few_samples_of_lists<T, T>(group_args, first, last);
    }
  };
  for_each_group(args.weight, work.groups, first_unit, begin, end, multiply);
  if (work.stream_output) stream_fence();
}

template BlockProductWork plan_block_product(const BlockProductArgs<float>&, int64_t);
template BlockProductWork plan_block_product(const BlockProductArgs<double>&, int64_t);
template void block_product(const BlockProductArgs<float>&, const BlockProductWork&, int64_t,
                            int64_t, float*);
template void block_product(const BlockProductArgs<double>&, const BlockProductWork&, int64_t,
                            int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
