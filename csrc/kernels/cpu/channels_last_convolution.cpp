// channels_last_convolution: the addresses that tiles of pixels read and write, and the walk over
// them. The contract is in channels_last_convolution.h.
#include "channels_last_convolution.h"

#include "channels_last_tile.h"
#include "convolution_entries.h"
#include "list_grid.h"
#include "pixel_runs.h"
#include "transpose.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// What a group of tiles reads: half of a second-level cache, beside the weights of a list.
constexpr int64_t kGroupBytes = 256 << 10;
// The table of their addresses, 8 bytes for each pixel and tap, is read from there as well.
constexpr int64_t kMostGroupTiles = 32;
// All weights pass by for each group.
constexpr int64_t kLeastGroupTiles = 4;
// Outputs from this size on are written past the caches, as in block_product.
constexpr int64_t kStreamBytes = int64_t{4} << 20;
constexpr int64_t kLineBytes = 64;

bool is_curved(Activation activation) {
  return activation != Activation::kNone && activation != Activation::kRelu &&
         activation != Activation::kRelu6;
}

// What a thread looks up: the list in hand, and the pixels of the group in hand.
template <class T>
struct Tables {
  PixelEntry<T>* entries;
  T** targets;        // where a pixel's outputs lie
  const T** sources;  // [tap][group_pixels]: what a tap reads for a pixel
};

template <class T>
int64_t tables_bytes(const BlockConvolutionArgs<T>& args, const ChannelsLastWork& work) {
  const int64_t bytes =
      work.entries * sizeof(PixelEntry<T>) + work.group_pixels * (args.num_taps + 1) * sizeof(T*);
  return ceil_divide(bytes, kLineBytes) * kLineBytes;
}

template <class T>
Tables<T> tables_at(const ChannelsLastWork& work, void* memory) {
  Tables<T> tables;
  tables.entries = static_cast<PixelEntry<T>*>(memory);
  tables.targets = reinterpret_cast<T**>(tables.entries + work.entries);
  tables.sources = const_cast<const T**>(tables.targets + work.group_pixels);
  return tables;
}

// Of the row of zeros that lies outside of the images, in whole lines.
template <class T>
int64_t zeros_size(const BlockConvolutionArgs<T>& args) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  return ceil_divide(args.input.channels, kLine) * kLine;
}

int64_t first_tile(const ChannelsLastWork& work, int64_t group) {
  return group * work.tiles / work.groups;
}

int64_t first_pixel(const ChannelsLastWork& work, int64_t tile) {
  const int64_t larger = tile < work.larger_tiles ? tile : work.larger_tiles;
  return tile * work.tile_pixels + larger;
}

// The addresses that pixels [first, last) read in a tap; `zeros` where that is outside the image.
template <class T>
void find_sources(const BlockConvolutionArgs<T>& args, const ConvolutionTap& tap, int64_t first,
                  int64_t last, const T* zeros, const T** sources) {
  const auto& input = args.input;
  const int64_t step = args.column_step * input.column_stride;
  for_each_row(
      args.output.height, args.output.width, first, last,
      [&](int64_t image, int64_t row, int64_t column, int64_t count) {
        const int64_t input_row = row * args.row_step + tap.row;
        const bool reads = input_row >= 0 && input_row < input.height;
        const InsideRun inside =
            inside_run(tap.column, args.column_step, input.width, column, reads ? count : 0);
        for (int64_t i = 0; i < inside.first; ++i) sources[i] = zeros;
        if (inside.first < inside.last) {
          const int64_t input_column = (column + inside.first) * args.column_step + tap.column;
          const T* source = input.data + image * input.image_stride + input_row * input.row_stride +
                            input_column * input.column_stride;
          const int64_t length = inside.last - inside.first;
          const T** at = sources + inside.first;
          for (int64_t i = 0; i < length; ++i) at[i] = source + i * step;
        }
        for (int64_t i = inside.last; i < count; ++i) sources[i] = zeros;
        sources += count;
      });
}

template <class T>
void find_targets(const ImageView<T>& output, int64_t first, int64_t last, T** targets) {
  for_each_row(output.height, output.width, first, last,
               [&](int64_t image, int64_t row, int64_t column, int64_t count) {
                 T* target = output.data + image * output.image_stride + row * output.row_stride +
                             column * output.column_stride;
                 for (int64_t i = 0; i < count; ++i) targets[i] = target + i * output.column_stride;
                 targets += count;
               });
}

// The entries of a list; returns their number. Strided weights are copied to `packed`.
template <class T>
int64_t make_entries(const BlockConvolutionArgs<T>& args, const TapGrid& grid, int64_t list,
                     int64_t group_pixels, PixelEntry<T>* entries, T* packed) {
  const auto& weight = args.weight;
  int64_t count = 0;
  for_each_entry(args, grid, list,
                 [&](const T* weights, int64_t tap, int64_t channel, int64_t steps) {
                   if (weight.output_stride != 1) {
                     transpose<T, true>(weights, weight.output_stride, weight.outputs, weight.steps,
                                        packed, weight.outputs);
                     weights = packed;
                     packed += weight.outputs * weight.steps;
                   }
                   entries[count++] = {weights, tap * group_pixels, channel, steps};
                 });
  return count;
}

// Where what a group reads first lies, past what the group before it reads; not a pointer, since
// it may lie outside of the images.
template <class T>
int64_t group_address(const BlockConvolutionArgs<T>& args, const ChannelsLastWork& work,
                      int64_t group) {
  const auto& input = args.input;
  const int64_t pixel =
      group < work.groups ? first_pixel(work, first_tile(work, group)) : work.pixels - 1;
  int64_t distance = 0;
  for_each_row(args.output.height, args.output.width, pixel, pixel + 1,
               [&](int64_t image, int64_t row, int64_t column, int64_t) {
                 distance = image * input.image_stride + row * args.row_step * input.row_stride +
                            column * args.column_step * input.column_stride;
               });
  if (args.num_taps > 0) {
    const ConvolutionTap& last_tap = args.taps[args.num_taps - 1];
    distance += last_tap.row * input.row_stride + last_tap.column * input.column_stride;
  }
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(input.data)) +
         distance * static_cast<int64_t>(sizeof(T));
}

// Stores the first `outputs` outputs of pixels from `buffer`, [pixel][width].
template <class T>
void store_part(const T* buffer, int64_t width, int64_t outputs, T* const* targets, int64_t pixels,
                int64_t channel) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t a = 0; a < outputs; ++a) targets[p][channel + a] = buffer[p * width + a];
  }
}

template <class T>
void activate_in_place(Activation activation, int64_t width, T* const* targets, int64_t pixels,
                       int64_t channel) {
  using V = Vec<T, kLanes<T>>;
  for (int64_t p = 0; p < pixels; ++p) {
    for (T* at = targets[p] + channel; at < targets[p] + channel + width; at += kLanes<T>) {
      store(at, activate<T, kLanes<T>>(load<V>(at), activation));
    }
  }
}

// All tiles of a group, for one list.
template <class T, int Vectors>
void convolve_list(const BlockConvolutionArgs<T>& args, const ChannelsLastWork& work,
                   const Tables<T>& tables, int64_t group, int64_t list, int64_t entries,
                   Fetch& next_group) {
  constexpr int64_t kWidth = Vectors * kLanes<T>;
  const Activation activation = args.activation;
  const bool curved = is_curved(activation);
  const auto [first_channel, outputs] = outputs_of(args, list);
  const auto smaller_tiles = pixel_tiles_of<T, Vectors>(work.tile_pixels);
  const auto larger_tiles = pixel_tiles_of<T, Vectors>(work.tile_pixels + 1);
  const int64_t first = first_tile(work, group), last_tile = first_tile(work, group + 1);
  alignas(64) T bias[kWidth], buffer[kMostPixels * kWidth];
  T* buffer_targets[kMostPixels];
  for (int64_t p = 0; p < kMostPixels; ++p) buffer_targets[p] = buffer + p * kWidth;
  PixelFinish<T> finish = {};
  finish.bias = bias;
  finish.clips = activation != Activation::kNone && !curved;
  finish.highest = activation == Activation::kRelu6 ? T{6} : static_cast<T>(__builtin_inf());
  for (int64_t output = 0; output < outputs; output += kWidth) {
    const int64_t channel = first_channel + output;
    const int64_t count = outputs - output < kWidth ? outputs - output : kWidth;
    const bool whole = count == kWidth;
    finish.stream = work.stream_output && whole;
    for (int64_t a = 0; a < kWidth; ++a)
      bias[a] = args.bias && a < count ? args.bias[channel + a] : T{};
    for (int64_t e = 0; output > 0 && e < entries; ++e) tables.entries[e].weights += kWidth;
    // Tiles of one size, one after the other; one by one where something follows.
    const int64_t step = whole && !curved ? last_tile - first : 1;
    int64_t pixel = 0, tiles;
    for (int64_t t = first; t < last_tile; t += tiles) {
      const bool larger = t < work.larger_tiles;
      const int64_t pixels = work.tile_pixels + larger;
      const int64_t same_end =
          larger && work.larger_tiles < last_tile ? work.larger_tiles : last_tile;
      tiles = same_end - t < step ? same_end - t : step;
      T* const* targets = whole ? tables.targets + pixel : buffer_targets;
      const int64_t target_channel = whole ? channel : 0;
      const auto convolve = larger ? larger_tiles : smaller_tiles;
      convolve(tables.entries, tables.entries + entries, args.weight.outputs,
               tables.sources + pixel, finish, targets, target_channel, tiles, next_group);
      if (curved) activate_in_place(activation, kWidth, targets, pixels, target_channel);
      if (!whole) store_part(buffer, kWidth, count, tables.targets + pixel, pixels, channel);
      pixel += tiles * pixels;
    }
  }
}

template <class T>
int64_t bytes_of(const ImageView<T>& images) {
  return images.images * images.channels * images.height * images.width *
         static_cast<int64_t>(sizeof(T));
}

// Tiles of a group: their inputs, as far as the taps do not share them, fill kGroupBytes.
template <class T>
int64_t group_tiles(const BlockConvolutionArgs<T>& args, int64_t tile_pixels) {
  const int64_t bytes = args.input.channels * static_cast<int64_t>(sizeof(T)) * args.row_step *
                        args.column_step * tile_pixels;
  const int64_t tiles = kGroupBytes / (bytes > 0 ? bytes : 1);
  return tiles < kLeastGroupTiles  ? kLeastGroupTiles
         : tiles < kMostGroupTiles ? tiles
                                   : kMostGroupTiles;
}

}  // namespace

template <class T>
bool serves_channels_last_convolution(const BlockConvolutionArgs<T>& args) {
  return args.input.channel_stride == 1 && args.output.channel_stride == 1 &&
         args.weight.outputs % kLanes<T> == 0;
}

template <class T>
ChannelsLastWork plan_channels_last_convolution(const BlockConvolutionArgs<T>& args,
                                                int64_t threads) {
  const auto& output = args.output;
  const auto& weight = args.weight;
  ChannelsLastWork work;
  work.vectors = weight.outputs % (2 * kLanes<T>) == 0 ? 2 : 1;
  const int64_t most_pixels = work.vectors == 1 ? kTilePixels<1> : kTilePixels<2>;
  work.pixels = output.images * output.height * output.width;
  work.tiles = ceil_divide(work.pixels, most_pixels);
  work.tile_pixels = work.pixels / work.tiles;
  work.larger_tiles = work.pixels % work.tiles;
  work.groups = ceil_divide(work.tiles, group_tiles(args, most_pixels));
  const int64_t weight_bytes = weight.offsets[weight.lists] * weight.outputs * weight.steps *
                               static_cast<int64_t>(sizeof(T));
  // A multiple of the threads, so that few groups are looked up by two of them; but small images
  // are read by all rather than large weights.
  if (bytes_of(args.input) > weight_bytes) {
    work.groups = ceil_divide(work.groups, threads) * threads;
    if (work.groups > work.tiles) work.groups = work.tiles;
  }
  work.total = work.tiles * cost_per_unit(weight);
  work.entries = 0;
  for (int64_t list = 0; list < weight.lists; ++list) {
    const int64_t entries = weight.offsets[list + 1] - weight.offsets[list];
    if (entries > work.entries) work.entries = entries;
  }
  const int64_t slice_bytes = work.vectors * kLanes<T> * static_cast<int64_t>(sizeof(T));
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  work.stream_output = kCanStream && slice_bytes % kLineBytes == 0 && !is_curved(args.activation) &&
                       bytes_of(output) >= kStreamBytes && output.channels % kLine == 0 &&
                       output.image_stride % kLine == 0 && output.row_stride % kLine == 0 &&
                       output.column_stride % kLine == 0 &&
                       reinterpret_cast<uintptr_t>(output.data) % kLineBytes == 0;
  work.group_pixels = 0;
  for (int64_t group = 0; group < work.groups; ++group) {
    const int64_t pixels =
        first_pixel(work, first_tile(work, group + 1)) - first_pixel(work, first_tile(work, group));
    if (pixels > work.group_pixels) work.group_pixels = pixels;
  }
  work.tables_size = tables_bytes(args, work);
  const int64_t packed =
      weight.output_stride == 1 ? 0 : work.entries * weight.outputs * weight.steps;
  work.scratch_size =
      work.tables_size / static_cast<int64_t>(sizeof(T)) + zeros_size(args) + packed;
  return work;
}

template <class T>
void channels_last_convolution(const BlockConvolutionArgs<T>& args, const ChannelsLastWork& work,
                               int64_t begin, int64_t end, T* scratch) {
  const Tables<T> tables = tables_at<T>(work, scratch);
  T* zeros = scratch + work.tables_size / static_cast<int64_t>(sizeof(T));
  T* packed = zeros + zeros_size(args);
  for (int64_t c = 0; c < args.input.channels; ++c) zeros[c] = T{};
  const TapGrid grid = grid_of(args, 0, 0);
  const auto convolve = work.vectors == 1 ? convolve_list<T, 1> : convolve_list<T, 2>;
  const auto convolve_group = [&](int64_t group, int64_t first_list, int64_t last_list) {
    const int64_t tiles = first_tile(work, group + 1) - first_tile(work, group);
    const int64_t first = first_pixel(work, first_tile(work, group));
    const int64_t last = first_pixel(work, first_tile(work, group + 1));
    find_targets(args.output, first, last, tables.targets);
    for (int64_t t = 0; t < args.num_taps; ++t) {
      find_sources(args, args.taps[t], first, last, zeros, tables.sources + t * work.group_pixels);
    }
    const int64_t next = group_address(args, work, group + 1);
    const int64_t after = group_address(args, work, group + 2);
    // Between slices of larger images lies what nobody reads.
    Fetch next_group(next, after - next < 4 * kGroupBytes ? after : next,
                     tiles * (last_list - first_list));
    for (int64_t list = first_list; list < last_list; ++list) {
      const int64_t entries =
          make_entries(args, grid, list, work.group_pixels, tables.entries, packed);
      convolve(args, work, tables, group, list, entries, next_group);
    }
  };
  for_each_group(
      args.weight, work.groups, [&](int64_t group) { return first_tile(work, group); }, begin, end,
      convolve_group);
  if (work.stream_output) stream_fence();
}

template bool serves_channels_last_convolution(const BlockConvolutionArgs<float>&);
template bool serves_channels_last_convolution(const BlockConvolutionArgs<double>&);
template ChannelsLastWork plan_channels_last_convolution(const BlockConvolutionArgs<float>&,
                                                         int64_t);
template ChannelsLastWork plan_channels_last_convolution(const BlockConvolutionArgs<double>&,
                                                         int64_t);
template void channels_last_convolution(const BlockConvolutionArgs<float>&, const ChannelsLastWork&,
                                        int64_t, int64_t, float*);
template void channels_last_convolution(const BlockConvolutionArgs<double>&,
                                        const ChannelsLastWork&, int64_t, int64_t, double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune
