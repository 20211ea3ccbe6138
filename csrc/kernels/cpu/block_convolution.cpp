// block_convolution: the grid of work, panels for inputs that cannot be read where they lie, and
// the way of the outputs into their memory format. The contract is in block_convolution.h.
#include "block_convolution.h"

#include "convolution_planes.h"
#include "convolution_tile.h"
#include "list_grid.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// Half of a second-level cache: the panel stays in it while all lists pass over it.
constexpr int64_t kPanelBytes = 384 << 10;
constexpr int64_t kMostGroupVectors = 24;
// Outputs that are computed before they leave: a cache line in channels-last images.
constexpr int64_t kStoredOutputs = 16;

// The bounds of the taps' shifts along the grid: what a group reads before its first position and
// after its last one.
struct Reach {
  int64_t before = 0, after = 0;
};

Reach reach_of(const TapGrid& grid) {
  Reach reach;
  for (int64_t t = 0; t < grid.num_taps; ++t) {
    const int64_t shift = tap_shift(grid, grid.taps[t]);
    if (-shift > reach.before) reach.before = -shift;
    if (shift > reach.after) reach.after = shift;
  }
  return reach;
}

// The grid of one sequence.
template <class T>
TapGrid grid_of(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work) {
  return {args.taps,          args.num_taps,     args.row_step,
          args.column_step,   args.input.height, args.input.width,
          args.output.height, args.output.width, work.in_place ? 1 : args.input.images,
          work.pitch,         work.rows};
}

// Positions of one image up to its last output.
template <class T>
int64_t image_positions(const BlockConvolutionArgs<T>& args, int64_t pitch) {
  return (args.output.height - 1) * pitch + args.output.width;
}

// Whether the images themselves are the grid. Vectors do not run across images then: where that
// leaves many lanes idle, a panel of several images is worth its copy.
template <class T>
bool can_read_in_place(const BlockConvolutionArgs<T>& args) {
  const auto& input = args.input;
  const int64_t pitch = input.row_stride;
  const int64_t widest = input.width > args.output.width ? input.width : args.output.width;
  if (args.row_step != 1 || args.column_step != 1 || input.column_stride != 1) return false;
  if (pitch < widest || pitch - widest > widest / 8) return false;
  const int64_t positions = image_positions(args, pitch);
  const int64_t lanes = ceil_divide(positions, kLanes<T>) * kLanes<T>;
  return input.images == 1 || 8 * positions >= 7 * lanes;
}

// Whether positions [first, first + count) of an image lie side by side in each output channel.
template <class T>
bool meets_output(const BlockConvolutionArgs<T>& args, int64_t pitch, int64_t first,
                  int64_t count) {
  const auto& output = args.output;
  return output.column_stride == 1 && output.width == pitch && output.row_stride == pitch &&
         first + count <= output.height * pitch;
}

// Rows of `result`, one for each of `outputs` channels, to the positions that begin at `first`.
template <class T>
void store_outputs(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                   int64_t image, int64_t first, int64_t count, int64_t channel, int64_t outputs,
                   const T* result) {
  constexpr int64_t kWidth = kTileVectors * kLanes<T>;
  const auto& output = args.output;
  const bool rows_meet =
      output.width == work.pitch && output.row_stride == work.pitch * output.column_stride;
  for_each_run(grid_of(args, work), output.height, output.width, rows_meet, first, count,
               [&](int64_t run_image, int64_t row, int64_t column, int64_t lane, int64_t length) {
                 T* target = output.data + (image + run_image) * output.image_stride +
                             channel * output.channel_stride + row * output.row_stride +
                             column * output.column_stride;
                 if (output.channel_stride == 1) {
                   transpose(result + lane, kWidth, outputs, length, target, output.column_stride);
                   return;
                 }
                 for (int64_t a = 0; a < outputs; ++a) {
                   T* row_target = target + a * output.channel_stride;
                   for (int64_t i = 0; i < length; ++i) {
                     row_target[i * output.column_stride] = result[a * kWidth + lane + i];
                   }
                 }
               });
}

template <class T>
using ConvolveList = void (*)(const BlockLists<T>&, int64_t, int64_t, int64_t, const TileSource<T>&,
                              const T*, T*, int64_t);

template <class T>
ConvolveList<T> list_function(bool unit_stride, int64_t vectors) {
  static_assert(kTileVectors == 3);
  if (vectors == 1) return unit_stride ? convolve_list<T, true, 1> : convolve_list<T, false, 1>;
  if (vectors == 2) return unit_stride ? convolve_list<T, true, 2> : convolve_list<T, false, 2>;
  return unit_stride ? convolve_list<T, true, 3> : convolve_list<T, false, 3>;
}

// One tile of vectors [vector, vector + vectors) of a sequence for lists [first, last).
template <class T>
struct Tile {
  int64_t sequence, vector, vectors;
  const T* data;  // of its first position in channel 0
  const TileTap<T>* taps;
};

template <class T>
void convolve_tile(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                   const Tile<T>& tile, int64_t list, T* result) {
  constexpr int64_t kWidth = kTileVectors * kLanes<T>;
  const auto& weight = args.weight;
  const int64_t lists_per_group = weight.lists / args.groups;
  const int64_t group = list / lists_per_group;
  const int64_t group_outputs = args.output.channels / args.groups;
  const int64_t group_channels = args.input.channels / args.groups;
  const int64_t list_output = list % lists_per_group * weight.outputs;
  const int64_t remaining = group_outputs - list_output;
  const int64_t outputs = weight.outputs < remaining ? weight.outputs : remaining;
  const auto convolve = list_function<T>(weight.output_stride == 1, tile.vectors);
  const TileSource<T> source = {tile.data + group * group_channels * work.plane, work.plane,
                                group_channels, args.sources_per_tap, tile.taps};
  const int64_t first = tile.vector * kLanes<T>, count = tile.vectors * kLanes<T>;
  const bool direct = work.in_place && meets_output(args, work.pitch, first, count);
  for (int64_t output = 0; output < outputs; output += kStoredOutputs) {
    const int64_t end = output + kStoredOutputs < outputs ? output + kStoredOutputs : outputs;
    const int64_t channel = group * group_outputs + list_output + output;
    const T* bias = args.bias ? args.bias + channel : nullptr;
    if (direct) {
      T* target = args.output.data + tile.sequence * args.output.image_stride +
                  channel * args.output.channel_stride + first;
      convolve(weight, list, output, end, source, bias, target, args.output.channel_stride);
      activate_rows(args.activation, end - output, count, target, args.output.channel_stride);
    } else {
      convolve(weight, list, output, end, source, bias, result, kWidth);
      activate_rows(args.activation, end - output, count, result, kWidth);
      store_outputs(args, work, work.in_place ? tile.sequence : 0, first, count, channel,
                    end - output, result);
    }
  }
}

}  // namespace

template <class T>
BlockConvolutionWork plan_block_convolution(const BlockConvolutionArgs<T>& args, int64_t threads) {
  const auto &input = args.input, &output = args.output;
  const int64_t input_rows = ceil_divide(input.height, args.row_step);
  const int64_t input_columns = ceil_divide(input.width, args.column_step);
  BlockConvolutionWork work;
  work.in_place = can_read_in_place(args);
  if (work.in_place) {
    work.pitch = input.row_stride;
    work.rows = output.height;
    work.sequences = input.images;
    work.vectors = ceil_divide(image_positions(args, work.pitch), kLanes<T>);
    work.groups = ceil_divide(work.vectors, kMostGroupVectors);
    work.before = work.after = 0;
    work.plane = input.channel_stride;
    work.panel_size = 0;
  } else {
    work.pitch = input_columns > output.width ? input_columns : output.width;
    work.rows = input_rows > output.height ? input_rows : output.height;
    work.sequences = 1;
    const int64_t positions =
        (input.images - 1) * work.rows * work.pitch + image_positions(args, work.pitch);
    work.vectors = ceil_divide(positions, kLanes<T>);
    const TapGrid grid = grid_of(args, work);
    const Reach reach = reach_of(grid);
    const int64_t channels = count_phases(grid, grid.num_taps) * input.channels;
    const int64_t held =
        kPanelBytes / (channels > 0 ? channels * sizeof(T) : 1) - reach.before - reach.after;
    int64_t most = held / (kTileVectors * kLanes<T>)*kTileVectors;
    most = most < kTileVectors ? kTileVectors : most < kMostGroupVectors ? most : kMostGroupVectors;
    // A multiple of the threads, so that few panels are filled by two of them.
    work.groups = ceil_divide(ceil_divide(work.vectors, most), threads) * threads;
    if (work.groups > work.vectors) work.groups = work.vectors;
    work.before = reach.before;
    work.after = reach.after;
    const int64_t longest = ceil_divide(work.vectors, work.groups) * kLanes<T>;
    // An odd number of cache lines, so that channels do not share their sets.
    constexpr int64_t kLine = 64 / sizeof(T);
    work.plane = (ceil_divide(reach.before + longest + reach.after, kLine) | 1) * kLine;
    work.panel_size = channels * work.plane;
  }
  work.total = work.sequences * work.vectors * cost_per_unit(args.weight);
  const int64_t tiles = ceil_divide(ceil_divide(work.vectors, work.groups), kTileVectors);
  const int64_t taps_size = args.num_taps * (tiles * sizeof(TileTap<T>) + sizeof(int64_t));
  work.taps_size = ceil_divide(taps_size, 64) * 64;
  work.scratch_size = work.taps_size / static_cast<int64_t>(sizeof(T)) +
                      kStoredOutputs * kTileVectors * kLanes<T> + work.panel_size;
  return work;
}

template <class T>
void block_convolution(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                       int64_t begin, int64_t end, T* scratch) {
  T* result = scratch + work.taps_size / static_cast<int64_t>(sizeof(T));
  T* panel = result + kStoredOutputs * kTileVectors * kLanes<T>;
  auto* tile_taps = reinterpret_cast<TileTap<T>*>(scratch);
  const int64_t most_tiles = ceil_divide(ceil_divide(work.vectors, work.groups), kTileVectors);
  auto* offsets = reinterpret_cast<int64_t*>(tile_taps + args.num_taps * most_tiles);
  const TapGrid grid = grid_of(args, work);
  for (int64_t t = 0; t < args.num_taps; ++t) {
    offsets[t] = tap_shift(grid, args.taps[t]) +
                 (work.in_place ? 0 : phase_rank(grid, t) * args.input.channels * work.plane);
  }
  const auto first_unit = [&](int64_t group) {
    return group / work.groups * work.vectors + group % work.groups * work.vectors / work.groups;
  };
  const auto convolve = [&](int64_t group, int64_t first_list, int64_t last_list) {
    const int64_t sequence = group / work.groups;
    const int64_t begin_vector = first_unit(group) - sequence * work.vectors;
    const int64_t end_vector = first_unit(group + 1) - sequence * work.vectors;
    const int64_t vectors = end_vector - begin_vector;
    const int64_t tiles = ceil_divide(vectors, kTileVectors);
    const int64_t first = begin_vector * kLanes<T>;
    const T* data = args.input.data + sequence * args.input.image_stride + first;
    if (!work.in_place) {
      const int64_t count = work.before + vectors * kLanes<T> + work.after;
      copy_phases(grid, args.input, first - work.before, count, panel, work.plane);
      data = panel + work.before;
    }
    const auto tile_of = [&](int64_t t) {
      const int64_t from = t * vectors / tiles, to = (t + 1) * vectors / tiles;
      return Tile<T>{sequence, begin_vector + from, to - from, data + from * kLanes<T>,
                     tile_taps + t * args.num_taps};
    };
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile<T> tile = tile_of(t);
      make_tile_taps(grid, offsets, tile.vector, tile.vectors, tile_taps + t * args.num_taps);
    }
    for (int64_t list = first_list; list < last_list; ++list) {
      for (int64_t t = 0; t < tiles; ++t) convolve_tile(args, work, tile_of(t), list, result);
    }
  };
  for_each_group(args.weight, work.sequences * work.groups, first_unit, begin, end, convolve);
}

template BlockConvolutionWork plan_block_convolution(const BlockConvolutionArgs<float>&, int64_t);
template BlockConvolutionWork plan_block_convolution(const BlockConvolutionArgs<double>&, int64_t);
template void block_convolution(const BlockConvolutionArgs<float>&, const BlockConvolutionWork&,
                                int64_t, int64_t, float*);
template void block_convolution(const BlockConvolutionArgs<double>&, const BlockConvolutionWork&,
                                int64_t, int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
