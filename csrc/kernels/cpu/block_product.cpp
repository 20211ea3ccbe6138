// block_product: the grid of work, and the choice between vectors along the samples
// (sample_panels.h) and along the outputs (few_samples.h). The contract is in block_product.h.
#include "block_product.h"

#include "few_samples.h"
#include "sample_panels.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// The first list that starts at or after position `cost` of one unit.
template <class T>
int64_t first_list_from(const BlockLists<T>& weight, int64_t cost) {
  int64_t low = 0, high = weight.lists;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (weight.offsets[middle] + middle < cost) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Samples [begin, end) as a problem of their own.
template <class T>
BlockProductArgs<T> samples_of(const BlockProductArgs<T>& args, int64_t begin, int64_t end) {
  BlockProductArgs<T> result = args;
  result.input.rows = result.output.rows = end - begin;
  result.input.data += begin * args.input.row_stride;
  result.output.data += begin * args.output.row_stride;
  return result;
}

}  // namespace

template <class T>
BlockProductWork plan_block_product(const BlockProductArgs<T>& args, int64_t threads) {
  const int64_t samples = args.input.rows;
  constexpr int64_t kVector = kLanes<T>;
  BlockProductWork work;
  work.transposed = args.weight.output_stride != 1 || samples > kVector / 2;
  work.units = work.transposed ? (samples + kVector - 1) / kVector : samples;
  const int64_t widest = work.transposed ? kPanelVectors : work.units;
  work.groups = widest > 0 ? (work.units + widest - 1) / widest : 1;
  if (work.transposed) {
    // A multiple of the threads, so that few panels are transposed by two of them.
    work.groups = (work.groups + threads - 1) / threads * threads;
    if (work.groups > work.units) work.groups = work.units;
  }
  work.stream_output = work.transposed && can_stream(args.output);
  work.cost_per_unit = args.weight.offsets[args.weight.lists] + args.weight.lists;
  work.total = work.units * work.cost_per_unit;
  work.scratch_size =
      work.transposed ? kPanelVectors * kVector * (args.input.cols + kStoredOutputs<T>) : 0;
  return work;
}

template <class T>
void block_product(const BlockProductArgs<T>& args, const BlockProductWork& work, int64_t begin,
                   int64_t end, T* scratch) {
  const auto& weight = args.weight;
  const int64_t unit = work.transposed ? kLanes<T> : 1;
  for (int64_t group = 0; group < work.groups; ++group) {
    const int64_t first_unit = group * work.units / work.groups;
    const int64_t last_unit = (group + 1) * work.units / work.groups;
    const int64_t width = last_unit - first_unit;
    // The part of [begin, end) in this group, in positions of one unit.
    const int64_t group_begin = begin - first_unit * work.cost_per_unit;
    const int64_t group_end = end - first_unit * work.cost_per_unit;
    if (group_end <= 0) break;
    if (group_begin >= width * work.cost_per_unit) continue;
    // Rounded up at both ends, so that ranges that meet neither overlap nor leave a gap.
    const int64_t first =
        group_begin > 0 ? first_list_from(weight, (group_begin + width - 1) / width) : 0;
    const int64_t last = group_end < width * work.cost_per_unit
                             ? first_list_from(weight, (group_end + width - 1) / width)
                             : weight.lists;
    if (first == last) continue;
    const int64_t last_sample =
        last_unit * unit < args.input.rows ? last_unit * unit : args.input.rows;
    const BlockProductArgs<T> group_args = samples_of(args, first_unit * unit, last_sample);
    if (work.transposed) {
      multiply_group(group_args, width, work.stream_output, first, last, scratch);
    } else {
      for (int64_t list = first; list < last; ++list) multiply_few_samples(group_args, list);
    }
  }
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
