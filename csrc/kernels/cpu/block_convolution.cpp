// block_convolution: how the work is cut, and the way of the outputs into their memory format. The
// contract is in block_convolution.h.
#include "block_convolution.h"

#include "convolution_entries.h"
#include "convolution_tile.h"
#include "list_grid.h"
#include "padded_panel.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// About half of a second-level cache: the panel stays in it while all lists pass over it.
constexpr int64_t kPanelBytes = 256 << 10;
// Steps of a list that a tile's outputs take one after the other: what they read, two to three
// cache lines a step, stays in the first-level cache from the first outputs to the last.
constexpr int64_t kChunkSteps = 96;
// Outputs that are computed before they leave: a cache line in channels-last images.
constexpr int64_t kStoredOutputs = 16;
template <class T>
constexpr int64_t kTileWidth = kTileVectors * kLanes<T>;

// The position of a vector's first lane.
template <class T>
int64_t position_of(const BlockConvolutionWork& work, int64_t vector) {
  const int64_t run = vector / work.run_vectors;
  const int64_t within = vector % work.run_vectors * kLanes<T>;
  if (work.runs_per_image == 0) return within;
  const int64_t image = run / work.runs_per_image, row = run % work.runs_per_image;
  return (image * work.rows + row) * work.pitch + within;
}

// Cuts the outputs into the fewest vectors.
template <class T>
void choose_runs(const BlockConvolutionArgs<T>& args, BlockConvolutionWork& work) {
  const auto& output = args.output;
  const int64_t image_positions = (output.height - 1) * work.pitch + output.width;
  const int64_t all_positions = (output.images - 1) * work.rows * work.pitch + image_positions;
  struct Runs {
    int64_t count, positions, per_image;
  };
  work.vectors = 0;
  for (const Runs& runs : {Runs{output.images * output.height, output.width, output.height},
                           Runs{output.images, image_positions, 1}, Runs{1, all_positions, 0}}) {
    const int64_t run_vectors = ceil_divide(runs.positions, kLanes<T>);
    if (work.vectors > 0 && runs.count * run_vectors >= work.vectors) continue;
    work.vectors = runs.count * run_vectors;
    work.run_vectors = run_vectors;
    work.run_positions = runs.positions;
    work.runs_per_image = runs.per_image;
  }
}

int64_t first_vector(const BlockConvolutionWork& work, int64_t group) {
  return group * work.vectors / work.groups;
}

// Positions that the panel of a group holds, from first_position on.
template <class T>
int64_t first_position(const BlockConvolutionWork& work, int64_t group) {
  return position_of<T>(work, first_vector(work, group)) - work.before;
}

template <class T>
int64_t count_positions(const BlockConvolutionWork& work, int64_t group) {
  const int64_t last = position_of<T>(work, first_vector(work, group + 1) - 1);
  return last + kLanes<T> + work.after - first_position<T>(work, group);
}

template <class T>
int64_t tiles_of(const BlockConvolutionWork& work) {
  return ceil_divide(ceil_divide(work.vectors, work.groups), kTileVectors);
}

// Lanes [lane, lane + length) of a tile, which go to `length` neighbouring outputs from `target` on
// in the first channel.
template <class T>
struct Store {
  T* target;
  int64_t lane, length;
};

// What a thread looks up: entries of the list in hand, and tiles and stores of the group in hand.
template <class T>
struct Tables {
  TileEntry<T>* entries;
  TileVectors* tiles;
  int64_t* first_vectors;  // of the tiles, and past the last
  int64_t* first_stores;   // the same
  Store<T>* stores;
};

template <class T>
int64_t tables_bytes(int64_t entries, int64_t tiles) {
  const int64_t bytes = entries * sizeof(TileEntry<T>) + tiles * sizeof(TileVectors) +
                        2 * (tiles + 1) * sizeof(int64_t) +
                        tiles * kTileWidth<T> * sizeof(Store<T>);
  return ceil_divide(bytes, 64) * 64;
}

template <class T>
Tables<T> tables_at(void* memory, int64_t entries, int64_t tiles) {
  Tables<T> tables;
  tables.entries = static_cast<TileEntry<T>*>(memory);
  tables.tiles = reinterpret_cast<TileVectors*>(tables.entries + entries);
  tables.first_vectors = reinterpret_cast<int64_t*>(tables.tiles + tiles);
  tables.first_stores = tables.first_vectors + tiles + 1;
  tables.stores = reinterpret_cast<Store<T>*>(tables.first_stores + tiles + 1);
  return tables;
}

template <class T>
int64_t most_entries(const BlockConvolutionArgs<T>& args) {
  return args.num_taps * args.sources_per_tap;
}

template <class T>
void make_tiles(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                const TapGrid& grid, int64_t group, const Tables<T>& tables) {
  const auto& output = args.output;
  const int64_t begin = first_vector(work, group), end = first_vector(work, group + 1);
  const int64_t tiles = ceil_divide(end - begin, kTileVectors);
  const int64_t panel = first_position<T>(work, group);
  const bool rows_meet =
      output.width == work.pitch && output.row_stride == work.pitch * output.column_stride;
  int64_t stores = 0;
  for (int64_t t = 0; t <= tiles; ++t) {
    tables.first_vectors[t] = begin + t * (end - begin) / tiles;
    tables.first_stores[t] = stores;
    if (t == tiles) break;
    const int64_t first = tables.first_vectors[t];
    const int64_t last = begin + (t + 1) * (end - begin) / tiles;
    tables.tiles[t].first = position_of<T>(work, first) - panel;
    for (int64_t vector = first; vector < last; ++vector) {
      const int64_t position = position_of<T>(work, vector);
      const int64_t lane = (vector - first) * kLanes<T>;
      tables.tiles[t].distance[vector - first] = position - panel - tables.tiles[t].first;
      const int64_t left = work.run_positions - vector % work.run_vectors * kLanes<T>;
      const int64_t count = left < kLanes<T> ? left : kLanes<T>;
      for_each_run(grid, output.height, output.width, rows_meet, position, count,
                   [&](int64_t image, int64_t row, int64_t column, int64_t within, int64_t length) {
                     T* target = output.data + image * output.image_stride +
                                 row * output.row_stride + column * output.column_stride;
                     Store<T>* before = tables.stores + stores - 1;
                     if (stores > tables.first_stores[t] &&
                         before->lane + before->length == lane + within &&
                         before->target + before->length * output.column_stride == target) {
                       before->length += length;
                     } else {
                       tables.stores[stores++] = {target, lane + within, length};
                     }
                   });
    }
  }
}

// The entries of a list; returns their number. Taps that read nothing are left out.
template <class T>
int64_t make_entries(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                     const TapGrid& grid, int64_t list, TileEntry<T>* entries) {
  int64_t count = 0, last_tap = -1, tap_offset = 0;
  for_each_entry(args, grid, list,
                 [&](const T* weights, int64_t tap, int64_t channel, int64_t steps) {
                   if (tap != last_tap) {
                     tap_offset = tap_shift(grid, args.taps[tap]) +
                                  phase_rank(grid, tap) * args.input.channels * work.plane;
                     last_tap = tap;
                   }
                   entries[count++] = {weights, tap_offset + channel * work.plane, steps};
                 });
  return count;
}

template <class T>
void store_outputs(const ImageView<T>& output, const Store<T>* begin, const Store<T>* end,
                   int64_t channel, int64_t outputs, const T* result) {
  for (const Store<T>* part = begin; part < end; ++part) {
    T* target = part->target + channel * output.channel_stride;
    const T* source = result + part->lane;
    if (output.channel_stride == 1) {
      transpose(source, kTileWidth<T>, outputs, part->length, target, output.column_stride);
      continue;
    }
    for (int64_t a = 0; a < outputs; ++a) {
      T* row = target + a * output.channel_stride;
      const T* lanes = source + a * kTileWidth<T>;
      if (output.column_stride == 1) {
        copy_exactly(lanes, part->length, row);
      } else {
        for (int64_t i = 0; i < part->length; ++i) row[i * output.column_stride] = lanes[i];
      }
    }
  }
}

template <class T>
using ConvolveList = void (*)(const TileList<T>&, int64_t, int64_t, const T*, int64_t,
                              const TileVectors&, T*, int64_t);

template <class T, bool kUnitStride, bool kFirst>
ConvolveList<T> list_function(int64_t vectors) {
  static_assert(kTileVectors == 3);
  return vectors == 1   ? convolve_list<T, kUnitStride, kFirst, 1>
         : vectors == 2 ? convolve_list<T, kUnitStride, kFirst, 2>
                        : convolve_list<T, kUnitStride, kFirst, 3>;
}

template <class T>
ConvolveList<T> list_function(bool unit_stride, bool first, int64_t vectors) {
  if (unit_stride) {
    return first ? list_function<T, true, true>(vectors) : list_function<T, true, false>(vectors);
  }
  return first ? list_function<T, false, true>(vectors) : list_function<T, false, false>(vectors);
}

// All tiles of one list.
template <class T>
void convolve_tiles(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                    const Tables<T>& tables, int64_t tiles, int64_t list, int64_t entries,
                    const T* panel, T* result) {
  const auto& weight = args.weight;
  const auto [first_channel, outputs] = outputs_of(args, list);
  const int64_t most = weight.steps < kChunkSteps ? kChunkSteps / weight.steps : 1;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t vectors = tables.first_vectors[t + 1] - tables.first_vectors[t];
    for (int64_t output = 0; output < outputs; output += kStoredOutputs) {
      const int64_t end = output + kStoredOutputs < outputs ? output + kStoredOutputs : outputs;
      const int64_t channel = first_channel + output;
      const Store<T>* first_store = tables.stores + tables.first_stores[t];
      const Store<T>* last_store = tables.stores + tables.first_stores[t + 1];
      int64_t entry = 0;
      do {
        const int64_t count = most < entries - entry ? most : entries - entry;
        const auto convolve = list_function<T>(weight.output_stride == 1, entry == 0, vectors);
        convolve({tables.entries + entry, count, weight.output_stride, weight.step_stride}, output,
                 end, panel, work.plane, tables.tiles[t], result, kTileWidth<T>);
        entry += count;
      } while (entry < entries);
      finish_rows(args.bias ? args.bias + channel : nullptr, args.activation, end - output,
                  vectors * kLanes<T>, result, kTileWidth<T>);
      store_outputs(args.output, first_store, last_store, channel, end - output, result);
    }
  }
}

// How many vectors a group should have.
template <class T>
int64_t group_vectors(const BlockConvolutionWork& work, int64_t channels) {
  const int64_t halo = work.before + work.after;
  const int64_t span = position_of<T>(work, work.vectors - 1) + kLanes<T>;
  const int64_t held = kPanelBytes / ((channels > 0 ? channels : 1) * sizeof(T)) - halo;
  // As much again as the halo, so that no more than half of what is copied is copied twice.
  const int64_t positions = held > halo ? held : halo;
  const int64_t vectors = positions * work.vectors / span / kTileVectors * kTileVectors;
  return vectors < kTileVectors ? kTileVectors : vectors;
}

}  // namespace

template <class T>
BlockConvolutionWork plan_block_convolution(const BlockConvolutionArgs<T>& args, int64_t threads) {
  BlockConvolutionWork work;
  TapGrid grid = grid_of(args, 0, 0);
  pad_grid(grid);
  work.pitch = grid.pitch;
  work.rows = grid.rows;
  choose_runs(args, work);
  const Reach reach = reach_of(grid);
  work.before = reach.before;
  work.after = reach.after;
  const int64_t channels = count_phases(grid, grid.num_taps) * args.input.channels;
  work.groups = ceil_divide(work.vectors, group_vectors<T>(work, channels));
  // A multiple of the threads, so that few panels are filled by two of them.
  work.groups = ceil_divide(work.groups, threads) * threads;
  if (work.groups > work.vectors) work.groups = work.vectors;
  int64_t longest = 0;
  for (int64_t group = 0; group < work.groups; ++group) {
    const int64_t count = count_positions<T>(work, group);
    if (count > longest) longest = count;
  }
  // Room for a vector that is written past the end; and an odd number of cache lines, so that
  // channels do not share their sets.
  constexpr int64_t kLine = 64 / sizeof(T);
  work.plane = (ceil_divide(longest + kLanes<T>, kLine) | 1) * kLine;
  work.panel_size = channels * work.plane;
  work.total = work.vectors * cost_per_unit(args.weight);
  const int64_t tiles = tiles_of<T>(work);
  work.tables_size = tables_bytes<T>(most_entries(args), tiles);
  work.scratch_size = work.tables_size / static_cast<int64_t>(sizeof(T)) +
                      kStoredOutputs * kTileWidth<T> + work.panel_size;
  return work;
}

template <class T>
void block_convolution(const BlockConvolutionArgs<T>& args, const BlockConvolutionWork& work,
                       int64_t begin, int64_t end, T* scratch) {
  const Tables<T> tables = tables_at<T>(scratch, most_entries(args), tiles_of<T>(work));
  T* result = scratch + work.tables_size / static_cast<int64_t>(sizeof(T));
  T* panel = result + kStoredOutputs * kTileWidth<T>;
  const TapGrid grid = grid_of(args, work.pitch, work.rows);
  const auto convolve = [&](int64_t group, int64_t first_list, int64_t last_list) {
    fill_panel(grid, args.input, first_position<T>(work, group), count_positions<T>(work, group),
               panel, work.plane);
    make_tiles(args, work, grid, group, tables);
    const int64_t vectors = first_vector(work, group + 1) - first_vector(work, group);
    for (int64_t list = first_list; list < last_list; ++list) {
      const int64_t entries = make_entries(args, work, grid, list, tables.entries);
      convolve_tiles(args, work, tables, ceil_divide(vectors, kTileVectors), list, entries, panel,
                     result);
    }
  };
  for_each_group(
      args.weight, work.groups, [&](int64_t group) { return first_vector(work, group); }, begin,
      end, convolve);
}

template BlockConvolutionWork plan_block_convolution(const BlockConvolutionArgs<float>&, int64_t);
template BlockConvolutionWork plan_block_convolution(const BlockConvolutionArgs<double>&, int64_t);
template void block_convolution(const BlockConvolutionArgs<float>&, const BlockConvolutionWork&,
                                int64_t, int64_t, float*);
template void block_convolution(const BlockConvolutionArgs<double>&, const BlockConvolutionWork&,
                                int64_t, int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
