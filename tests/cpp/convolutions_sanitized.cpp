// The convolutions' CPU kernels under AddressSanitizer and UBSan, as kernels_sanitized.cpp does it.
//
// Usage: convolutions_sanitized <instruction set>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "cpu/dispatch.h"
#include "sanitized.h"
#include "transposed_structure.h"

namespace {

using namespace fastprune;

struct Case {
  int64_t images, in_channels, out_channels, height, width, kernel, stride, padding, dilation,
      groups;
  int64_t rows, cols;
  bool channels_last;
};

int64_t output_size(int64_t size, const Case& c) {
  return (size + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
}

// An array of exactly `count` elements at a multiple of 64 bytes, as the kernels want their
// scratch.
template <class T>
struct AlignedScratch {
  explicit AlignedScratch(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64))) {}
  AlignedScratch(const AlignedScratch&) = delete;
  ~AlignedScratch() { std::free(data); }
  T* data;
};

template <class T>
ImageView<T> view_of(T* data, int64_t images, int64_t channels, int64_t height, int64_t width,
                     bool channels_last) {
  if (channels_last) {
    return {data, images,           channels, height, width, height * width * channels,
            1,    width * channels, channels};
  }
  return {data,           images, channels, height, width, channels * height * width,
          height * width, width,  1};
}

template <class T>
T& at(const ImageView<T>& view, int64_t n, int64_t c, int64_t i, int64_t j) {
  return view.data[n * view.image_stride + c * view.channel_stride + i * view.row_stride +
                   j * view.column_stride];
}

// Everything that one case needs: weight, input, gradient of the output, and plain loops over all
// of its products.
template <class T>
struct Problem {
  Case c;
  int64_t channel_blocks, block_rows, out_height, out_width;
  Pattern pattern;
  std::vector<T> values, input, grad_output;
  std::vector<ConvolutionTap> taps;

  explicit Problem(const Case& of)
      : c(of),
        channel_blocks(ceil_divide(c.in_channels / c.groups, c.cols)),
        block_rows(ceil_divide(c.out_channels, c.rows)),
        out_height(output_size(c.height, c)),
        out_width(output_size(c.width, c)),
        pattern(block_rows, c.kernel * c.kernel * channel_blocks, 0.5),
        values(random_values<T>(int64_t(pattern.col.size()) * c.rows * c.cols)),
        input(random_values<T>(c.images * c.in_channels * c.height * c.width)),
        grad_output(random_values<T>(c.images * c.out_channels * out_height * out_width)) {
    for (int64_t y = 0; y < c.kernel; ++y) {
      for (int64_t x = 0; x < c.kernel; ++x) {
        taps.push_back({y * c.dilation - c.padding, x * c.dilation - c.padding});
      }
    }
  }

  ImageView<const T> input_view() const {
    return view_of<const T>(input.data(), c.images, c.in_channels, c.height, c.width,
                            c.channels_last);
  }
  ImageView<const T> gradient_view() const {
    return view_of<const T>(grad_output.data(), c.images, c.out_channels, out_height, out_width,
                            c.channels_last);
  }

  // visit(value, image, in channel, row, column, out channel, out row, out column)
  template <class Visit>
  void for_each_product(const Visit& visit) const {
    const int64_t group_in = c.in_channels / c.groups;
    for (int64_t r = 0; r < block_rows; ++r) {
      for (int64_t k = pattern.crow[r]; k < pattern.crow[r + 1]; ++k) {
        const ConvolutionTap tap = taps[pattern.col[k] / channel_blocks];
        for (int64_t e = 0; e < c.rows * c.cols; ++e) {
          const int64_t in = pattern.col[k] % channel_blocks * c.cols + e / c.rows;
          const int64_t out = r * c.rows + e % c.rows;
          if (in >= group_in || out >= c.out_channels) continue;
          const int64_t group = out / (c.out_channels / c.groups);
          for (int64_t n = 0; n < c.images; ++n) {
            for (int64_t i = 0; i < out_height; ++i) {
              for (int64_t j = 0; j < out_width; ++j) {
                const int64_t row = i * c.stride + tap.row, column = j * c.stride + tap.column;
                if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
                visit(k * c.rows * c.cols + e, n, group * group_in + in, row, column, out, i, j);
              }
            }
          }
        }
      }
    }
  }
};

// Runs a convolution in three chunks, each into an array of its own: together they must write
// every output once, from `first` on. run(args, begin, end) computes positions [begin, end) of
// `total`.
constexpr int64_t kChunks = 3;

template <class T, class Run>
void run_chunks(BlockConvolutionArgs<T> args, const Case& c, std::vector<T>& output, int64_t first,
                int64_t total, const char* what, const Run& run) {
  constexpr T kUntouched = T(1e30);
  bool once = true;
  for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
    std::vector<T> part(output.size(), kUntouched);
    args.output.data = part.data() + first;
    run(args, total * chunk / kChunks, total * (chunk + 1) / kChunks);
    for (size_t i = 0; i < part.size(); ++i) {
      if (part[i] == kUntouched) continue;
      once &= output[i] == kUntouched;
      output[i] = part[i];
    }
  }
  check(once, what, c.images, c.height, c.width);
}

// The same by each of the kernels that serve the images, which must agree in every bit. Where
// `output` holds values already, they are those of another phase.
template <class T>
void run_convolution(const BlockConvolutionArgs<T>& args, const Case& c, std::vector<T>& output,
                     int64_t first) {
  const auto& kernels = kernels_of<T>(cpu_kernels());
  std::vector<T> other = output;
  const BlockConvolutionWork work = kernels.plan_block_convolution(args, kChunks);
  run_chunks(args, c, output, first, work.total, "the division of block_convolution",
             [&](const BlockConvolutionArgs<T>& part, int64_t begin, int64_t end) {
               const AlignedScratch<T> scratch(work.scratch_size);
               kernels.block_convolution(part, work, begin, end, scratch.data);
             });
  if (!kernels.serves_channels_last_convolution(args)) return;
  const ChannelsLastWork last = kernels.plan_channels_last_convolution(args, kChunks);
  run_chunks(args, c, other, first, last.total, "the division of channels_last_convolution",
             [&](const BlockConvolutionArgs<T>& part, int64_t begin, int64_t end) {
               const AlignedScratch<T> scratch(last.scratch_size);
               kernels.channels_last_convolution(part, last, begin, end, scratch.data);
             });
  check(output == other, "the bits of channels_last_convolution", c.images, c.height, c.width);
}

template <class T>
void check_close(const std::vector<T>& found, const std::vector<double>& wanted, const char* what,
                 const Case& c) {
  bool equal = true;
  for (size_t i = 0; i < wanted.size(); ++i) {
    equal &= std::abs(wanted[i] - double(found[i])) < 2e-3;
  }
  check(equal, what, c.in_channels, c.height, c.width);
}

template <class T>
void test_forward(const Problem<T>& problem) {
  const Case& c = problem.c;
  const auto bias = random_values<T>(c.out_channels);
  std::vector<T> output(problem.grad_output.size(), T(1e30));
  BlockConvolutionArgs<T> args;
  args.input = problem.input_view();
  args.weight = {problem.values.data(),
                 problem.pattern.crow.data(),
                 problem.pattern.col.data(),
                 nullptr,
                 problem.block_rows,
                 c.rows,
                 c.cols,
                 1,
                 c.rows};
  args.sources_per_tap = problem.channel_blocks;
  args.groups = c.groups;
  args.taps = problem.taps.data();
  args.num_taps = c.kernel * c.kernel;
  args.row_step = args.column_step = c.stride;
  args.bias = bias.data();
  args.output = view_of<T>(nullptr, c.images, c.out_channels, problem.out_height, problem.out_width,
                           c.channels_last);
  args.activation = Activation::kRelu6;
  run_convolution(args, c, output, 0);

  std::vector<double> wanted(output.size());
  const auto at_output = view_of<double>(wanted.data(), c.images, c.out_channels,
                                         problem.out_height, problem.out_width, c.channels_last);
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t o = 0; o < c.out_channels; ++o) {
      for (int64_t p = 0; p < problem.out_height * problem.out_width; ++p) {
        at(at_output, n, o, p / problem.out_width, p % problem.out_width) = bias[o];
      }
    }
  }
  const auto input = problem.input_view();
  problem.for_each_product([&](int64_t value, int64_t n, int64_t in, int64_t row, int64_t column,
                               int64_t out, int64_t i, int64_t j) {
    at(at_output, n, out, i, j) +=
        double(problem.values[value]) * double(at(input, n, in, row, column));
  });
  for (double& value : wanted) value = std::min(std::max(value, 0.0), 6.0);
  check_close(output, wanted, "block_convolution", c);
}

template <class T>
void test_input_gradient(const Problem<T>& problem) {
  const Case& c = problem.c;
  std::vector<T> found(problem.input.size(), T(1e30));
  for (int64_t phase = 0; phase < c.stride * c.stride; ++phase) {
    const int64_t row_phase = phase / c.stride, column_phase = phase % c.stride;
    if (row_phase >= c.height || column_phase >= c.width) continue;
    std::vector<ConvolutionTap> taps;
    std::vector<int32_t> ranks(c.kernel * c.kernel, -1);
    for (int64_t t = 0; t < c.kernel * c.kernel; ++t) {
      const int64_t row = row_phase - problem.taps[t].row;
      const int64_t column = column_phase - problem.taps[t].column;
      if (row % c.stride != 0 || column % c.stride != 0) continue;
      ranks[t] = static_cast<int32_t>(taps.size());
      taps.push_back({row / c.stride, column / c.stride});
    }
    const TransposedStructure structure =
        transpose_convolution(problem.pattern.crow.data(), problem.pattern.col.data(),
                              problem.block_rows, problem.channel_blocks, c.groups, ranks);
    BlockConvolutionArgs<T> args;
    args.input = problem.gradient_view();
    args.weight = {problem.values.data(),
                   structure.offsets.data(),
                   structure.sources.data(),
                   structure.blocks.data(),
                   c.groups * problem.channel_blocks,
                   c.cols,
                   c.rows,
                   c.rows,
                   1};
    args.sources_per_tap = problem.block_rows / c.groups;
    args.groups = c.groups;
    args.taps = taps.data();
    args.num_taps = static_cast<int64_t>(taps.size());
    args.row_step = args.column_step = 1;
    args.bias = nullptr;
    args.output = view_of<T>(nullptr, c.images, c.in_channels, c.height, c.width, c.channels_last);
    const int64_t first =
        row_phase * args.output.row_stride + column_phase * args.output.column_stride;
    args.output.height = ceil_divide(c.height - row_phase, c.stride);
    args.output.width = ceil_divide(c.width - column_phase, c.stride);
    args.output.row_stride *= c.stride;
    args.output.column_stride *= c.stride;
    args.activation = Activation::kNone;
    run_convolution(args, c, found, first);
  }
  std::vector<double> wanted(found.size());
  const auto at_input =
      view_of<double>(wanted.data(), c.images, c.in_channels, c.height, c.width, c.channels_last);
  const auto gradient = problem.gradient_view();
  problem.for_each_product([&](int64_t value, int64_t n, int64_t in, int64_t row, int64_t column,
                               int64_t out, int64_t i, int64_t j) {
    at(at_input, n, in, row, column) +=
        double(problem.values[value]) * double(at(gradient, n, out, i, j));
  });
  check_close(found, wanted, "the input gradient of a convolution", c);
}

template <class T>
void test_weight_gradient(const Problem<T>& problem) {
  const Case& c = problem.c;
  std::vector<T> found(problem.values.size(), T(1e30));
  BlockSparseConv2dWeightGradientArgs<T> args;
  args.input = problem.input_view();
  args.grad_output = problem.gradient_view();
  args.crow_indices = problem.pattern.crow.data();
  args.col_indices = problem.pattern.col.data();
  args.block_rows = problem.block_rows;
  args.rows = c.rows;
  args.cols = c.cols;
  args.channel_blocks = problem.channel_blocks;
  args.groups = c.groups;
  args.taps = problem.taps.data();
  args.num_taps = c.kernel * c.kernel;
  args.row_step = args.column_step = c.stride;
  args.grad_values = found.data();
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const BlockSparseConv2dWeightGradientWork work = kernels.plan_conv2d_weight_gradient(args);
  // What the copies leave out would show in the sums.
  std::vector<T> planes(c.images * work.image_size, std::numeric_limits<T>::quiet_NaN());
  kernels.copy_conv2d_planes(args, work, 0, c.images / 2, planes.data());
  kernels.copy_conv2d_planes(args, work, c.images / 2, c.images, planes.data());
  for (int64_t chunk = 0; chunk < 3; ++chunk) {
    kernels.conv2d_weight_gradient(args, work, planes.data(), work.total * chunk / 3,
                                   work.total * (chunk + 1) / 3);
  }
  std::vector<double> wanted(found.size());
  const auto input = problem.input_view();
  const auto gradient = problem.gradient_view();
  problem.for_each_product([&](int64_t value, int64_t n, int64_t in, int64_t row, int64_t column,
                               int64_t out, int64_t i, int64_t j) {
    wanted[value] += double(at(input, n, in, row, column)) * double(at(gradient, n, out, i, j));
  });
  check_close(found, wanted, "the weight gradient of a convolution", c);
  if (!kernels.serves_channels_last_weight_gradient(args)) return;
  std::vector<T> other(found.size(), T(1e30));
  args.grad_values = other.data();
  const ChannelsLastWeightGradientWork last = kernels.plan_channels_last_weight_gradient(args);
  for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
    const AlignedScratch<T> scratch(last.scratch_size);
    kernels.channels_last_weight_gradient(args, last, last.total * chunk / kChunks,
                                          last.total * (chunk + 1) / kChunks, scratch.data);
  }
  check_close(other, wanted, "the weight gradient of channels-last images", c);
}

template <class T>
void test_all() {
  for (bool channels_last : {false, true}) {
    for (const Case& c :
         std::initializer_list<Case>{{2, 15, 17, 9, 9, 3, 1, 1, 1, 1, 8, 8, channels_last},
                                     {3, 17, 9, 7, 7, 3, 1, 1, 1, 1, 16, 16, channels_last},
                                     {1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, channels_last},
                                     {2, 5, 20, 1, 7, 3, 1, 2, 1, 1, 5, 3, channels_last},
                                     {2, 8, 8, 5, 3, 3, 2, 1, 1, 1, 8, 8, channels_last},
                                     {3, 6, 8, 12, 16, 3, 2, 1, 2, 2, 4, 2, channels_last},
                                     {2, 9, 6, 11, 20, 3, 3, 0, 1, 3, 2, 2, channels_last},
                                     {1, 33, 5, 16, 16, 1, 1, 0, 1, 1, 8, 16, channels_last},
                                     {2, 4, 4, 9, 10, 1, 2, 0, 1, 1, 4, 4, channels_last},
                                     {1, 3, 16, 40, 41, 5, 1, 2, 1, 1, 16, 4, channels_last}}) {
      const Problem<T> problem(c);
      test_forward(problem);
      test_input_gradient(problem);
      test_weight_gradient(problem);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  set_cpu_isa(argc > 1 ? argv[1] : "");
  test_all<float>();
  test_all<double>();
  std::printf("%s: %d failures\n", cpu_kernels().isa, failures);
  return failures == 0 ? 0 : 1;
}
