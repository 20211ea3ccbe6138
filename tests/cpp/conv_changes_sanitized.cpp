// ablate_conv2d and updated_conv2d under AddressSanitizer and UBSan: every array has exactly its
// size, so a read or a write past an end stops the program. Values are compared with plain loops in
// double.
//
// Usage: conv_changes_sanitized <instruction set>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "cpu/dispatch.h"
#include "sanitized.h"

namespace {

using namespace fastprune;

// Channels-last images.
struct Images {
  int64_t count, channels, height, width;

  int64_t size() const { return count * channels * height * width; }
  int64_t at(int64_t n, int64_t row, int64_t column, int64_t channel) const {
    return ((n * height + row) * width + column) * channels + channel;
  }
  bool holds(int64_t row, int64_t column) const {
    return row >= 0 && row < height && column >= 0 && column < width;
  }
  template <class T>
  ImageView<const T> view(const T* data) const {
    return {data,       count,
            channels,   height,
            width,      height * width * channels,
            int64_t{1}, width * channels,
            channels};
  }
};

constexpr double kTolerance = 1e-3;

template <class T>
void test_ablate_conv2d(int64_t images, int64_t in_channels, int64_t out_channels, int64_t height,
                        int64_t width, int64_t stride) {
  const Images in = {images, in_channels, height, width};
  const int64_t out_height = (height - 1) / stride + 1, out_width = (width - 1) / stride + 1;
  const Images out = {images, out_channels, out_height, out_width};
  std::vector<ConvolutionTap> taps;
  for (int64_t t = 0; t < 9; ++t) taps.push_back({t / 3 - 1, t % 3 - 1});
  const auto input = random_values<T>(in.size());
  const auto output = random_values<T>(out.size());
  const auto weight = random_values<T>(out_channels * in_channels * 9);
  const std::vector<int32_t> pieces = {0,
                                       int32_t(in_channels),
                                       0,
                                       9,
                                       int32_t(in_channels / 2),
                                       int32_t(in_channels),
                                       4,
                                       5,
                                       0,
                                       1,
                                       0,
                                       9,
                                       0,
                                       int32_t(in_channels),
                                       7,
                                       9,
                                       0,
                                       0,
                                       0,
                                       9};
  AblateConv2dArgs<T> args;
  args.output = out.view(output.data());
  args.input = in.view(input.data());
  args.weight = {weight.data(), in_channels * 9, 9, 1};
  args.taps = taps.data();
  args.row_step = args.column_step = stride;
  args.pieces = pieces.data();
  args.num_pieces = int64_t(pieces.size()) / 4;
  args.activation = Activation::kRelu;
  std::vector<T> masked(args.num_pieces * out.size(), T(1e30));
  args.masked = masked.data();
  const auto& kernels = kernels_of<T>(cpu_kernels());
  std::vector<T> scratch(kernels.ablate_conv2d_scratch(args));
  const int64_t total = args.num_pieces * images;
  kernels.ablate_conv2d(args, 0, total / 3, scratch.data());
  kernels.ablate_conv2d(args, total / 3, total, scratch.data());

  bool equal = true;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* piece = pieces.data() + 4 * m;
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t i = 0; i < out_height; ++i) {
        for (int64_t j = 0; j < out_width; ++j) {
          for (int64_t o = 0; o < out_channels; ++o) {
            double wanted = output[out.at(n, i, j, o)];
            for (int64_t t = piece[2]; t < piece[3]; ++t) {
              const int64_t row = i * stride + taps[t].row, column = j * stride + taps[t].column;
              if (!in.holds(row, column)) continue;
              for (int64_t c = piece[0]; c < piece[1]; ++c) {
                wanted -= double(input[in.at(n, row, column, c)]) *
                          double(weight[(o * in_channels + c) * 9 + t]);
              }
            }
            const double found = masked[m * out.size() + out.at(n, i, j, o)];
            equal &= std::abs(std::max(wanted, 0.0) - found) < kTolerance;
          }
        }
      }
    }
  }
  check(equal, "ablate_conv2d", in_channels, out_channels, height);
}

// G w G^T of one 3x3 kernel, to 36 points that lie `stride` apart.
template <class T>
void transform_weight(const T* weight, T* points, int64_t stride) {
  constexpr double kTransform[6][3] = {{1.0 / 4, 0, 0},
                                       {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                       {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                       {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                       {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                       {0, 0, 1}};
  for (int64_t point = 0; point < 36; ++point) {
    double sum = 0;
    for (int64_t tap = 0; tap < 9; ++tap) {
      sum += kTransform[point / 6][tap / 3] * kTransform[point % 6][tap % 3] * double(weight[tap]);
    }
    points[point * stride] = T(sum);
  }
}

template <class T>
void test_updated_conv2d(int64_t images, int64_t in_channels, int64_t out_channels, int64_t height,
                         int64_t width, int64_t padding, bool addends) {
  const Images in = {images, in_channels, height, width};
  const Images out = {images, out_channels, height + 2 * padding - 2, width + 2 * padding - 2};
  const auto input = random_values<T>(in.size()), new_input = random_values<T>(in.size());
  const auto known = random_values<T>(out.size());
  const auto addend = random_values<T>(out.size()), new_addend = random_values<T>(out.size());
  const auto weight = random_values<T>(out_channels * in_channels * 9);
  const int64_t panels = ceil_divide(out_channels, kWinogradOutputs);
  const int64_t plane = panels * in_channels * kWinogradOutputs;
  std::vector<T> transformed(kWinogradPoints * plane);
  for (int64_t o = 0; o < out_channels; ++o) {
    for (int64_t c = 0; c < in_channels; ++c) {
      const int64_t place = ((o / kWinogradOutputs) * in_channels + c) * kWinogradOutputs;
      transform_weight(weight.data() + (o * in_channels + c) * 9,
                       transformed.data() + place + o % kWinogradOutputs, plane);
    }
  }
  std::vector<T> output(out.size(), T(1e30));
  UpdatedConv2dArgs<T> args;
  args.known = known.data();
  args.input = input.data();
  args.new_input = new_input.data();
  args.addend = addends ? addend.data() : nullptr;
  args.new_addend = addends ? new_addend.data() : nullptr;
  args.weight = transformed.data();
  args.images = images;
  args.in_height = height;
  args.in_width = width;
  args.in_channels = in_channels;
  args.height = out.height;
  args.width = out.width;
  args.out_channels = out_channels;
  args.padding_top = args.padding_left = padding;
  args.activation = Activation::kRelu;
  args.output = output.data();
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const UpdatedConv2dWork work = kernels.plan_updated_conv2d(args);
  std::vector<T> scratch(work.scratch_size);
  for (int64_t part = 0; part < 3; ++part) {
    kernels.updated_conv2d(args, work, work.total * part / 3, work.total * (part + 1) / 3,
                           scratch.data());
  }

  bool equal = true;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t i = 0; i < out.height; ++i) {
      for (int64_t j = 0; j < out.width; ++j) {
        for (int64_t o = 0; o < out_channels; ++o) {
          const int64_t place = out.at(n, i, j, o);
          double wanted = known[place];
          if (addends) wanted += double(new_addend[place]) - double(addend[place]);
          for (int64_t t = 0; t < 9; ++t) {
            const int64_t row = i + t / 3 - padding, column = j + t % 3 - padding;
            if (!in.holds(row, column)) continue;
            for (int64_t c = 0; c < in_channels; ++c) {
              const int64_t pixel = in.at(n, row, column, c);
              wanted += (double(new_input[pixel]) - double(input[pixel])) *
                        double(weight[(o * in_channels + c) * 9 + t]);
            }
          }
          equal &= std::abs(std::max(wanted, 0.0) - double(output[place])) < kTolerance;
        }
      }
    }
  }
  check(equal, "updated_conv2d", in_channels, out_channels, height);
}

template <class T>
void test_all() {
  for (int64_t in_channels : {1, 5, 16, 33}) {
    for (int64_t out_channels : {1, 15, 17, 80}) {
      test_ablate_conv2d<T>(2, in_channels, out_channels, 7, 9, 1);
      test_ablate_conv2d<T>(1, in_channels, out_channels, 5, 15, 2);
      test_updated_conv2d<T>(2, in_channels, out_channels, 7, 9, 1, true);
      test_updated_conv2d<T>(3, in_channels, out_channels, 4, 4, 0, false);
      test_updated_conv2d<T>(1, in_channels, out_channels, 2, 3, 4, true);
    }
  }
  test_ablate_conv2d<T>(1, 2, 3, 1, 1, 1);
  test_updated_conv2d<T>(1, 2, 3, 1, 1, 1, false);
  test_updated_conv2d<T>(7, 3, 130, 13, 12, 1, true);
  test_updated_conv2d<T>(5, 49, 66, 9, 10, 1, true);  // two chunks of unequal size
}

}  // namespace

int main(int argc, char** argv) {
  set_cpu_isa(argc > 1 ? argv[1] : "");
  test_all<float>();
  test_all<double>();
  std::printf("%s: %d failures\n", cpu_kernels().isa, failures);
  return failures == 0 ? 0 : 1;
}
