// What the convolution kernels look up in the lists of their weight.
#pragma once

#include "block_convolution.h"
#include "convolution_grid.h"

namespace fastprune {
namespace {

template <class T>
TapGrid grid_of(const BlockConvolutionArgs<T>& args, int64_t pitch, int64_t rows) {
  return {args.taps,
          args.num_taps,
          args.row_step,
          args.column_step,
          args.input.height,
          args.input.width,
          args.output.height,
          args.output.width,
          args.input.images,
          pitch,
          rows};
}

// Calls entry(weights, tap, channel, steps) for the entries of a list whose taps read the input for
// any output; `channel` is the first one that it reads, and `steps` ends with the group's channels.
template <class T, class Entry>
void for_each_entry(const BlockConvolutionArgs<T>& args, const TapGrid& grid, int64_t list,
                    const Entry& entry) {
  const auto& weight = args.weight;
  const int64_t group_channels = args.input.channels / args.groups;
  const int64_t first_channel = list / (weight.lists / args.groups) * group_channels;
  int64_t tap = -1;
  bool reads = false;
  for (int64_t j = weight.offsets[list]; j < weight.offsets[list + 1]; ++j) {
    const int64_t source = weight.sources[j];
    // Neighbouring entries are mostly of one tap: no division then.
    if (tap < 0 || source < tap * args.sources_per_tap ||
        source >= (tap + 1) * args.sources_per_tap) {
      tap = source / args.sources_per_tap;
      reads = tap_reads(grid, args.taps[tap]);
    }
    if (!reads) continue;
    const int64_t channel = (source - tap * args.sources_per_tap) * weight.steps;
    const int64_t left = group_channels - channel;
    const int64_t block = weight.blocks ? weight.blocks[j] : j;
    entry(weight.values + block * weight.outputs * weight.steps, tap, first_channel + channel,
          left < weight.steps ? left : weight.steps);
  }
}

// The output channels of a list.
struct ListOutputs {
  int64_t first, count;
};

template <class T>
ListOutputs outputs_of(const BlockConvolutionArgs<T>& args, int64_t list) {
  const int64_t lists_per_group = args.weight.lists / args.groups;
  const int64_t group_outputs = args.output.channels / args.groups;
  const int64_t within = list % lists_per_group * args.weight.outputs;
  const int64_t left = group_outputs - within;
  return {list / lists_per_group * group_outputs + within,
          left < args.weight.outputs ? left : args.weight.outputs};
}

}  // namespace
}  // namespace fastprune
