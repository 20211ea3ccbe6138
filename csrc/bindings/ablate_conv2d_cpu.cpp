#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/dispatch.h"
#include "ablation_checks.h"
#include "activation_names.h"
#include "channels_last.h"
#include "parallel_kernel.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "ablate_conv2d";

void check_pieces(const int32_t* pieces, int64_t num_pieces, int64_t channels, int64_t taps) {
  for (int64_t m = 0; m < num_pieces; ++m) {
    const int32_t* p = pieces + 4 * m;
    if (p[0] < 0 || p[0] > p[1] || p[1] > channels || p[2] < 0 || p[2] > p[3] || p[3] > taps) {
      throw_value_error(kOp, ": `pieces` must lie within ", channels, " channels and ", taps,
                        " taps, got channels ", p[0], " to ", p[1], " and taps ", p[2], " to ",
                        p[3], " for piece ", m);
    }
  }
}

void check_images(const char* name, const Tensor& tensor, const Tensor& like) {
  check_same_device(kOp, name, tensor, like);
  check_dim(kOp, name, tensor, 4);
  check_dtype(kOp, name, tensor, like.scalar_type());
}

template <class T>
Tensor run(const Tensor& output, const Tensor& input, const Tensor& weight, const Tensor& pieces,
           const ConvolutionGeometry& geometry, Activation activation) {
  const std::vector<ConvolutionTap> taps = forward_taps(geometry);
  AblateConv2dArgs<T> args;
  args.output = image_view<const T>(output.const_data_ptr(), output);
  args.input = image_view<const T>(input.const_data_ptr(), input);
  args.weight = {static_cast<const T*>(weight.const_data_ptr()), weight.stride(0), weight.stride(1),
                 weight.stride(3)};
  args.taps = taps.data();
  args.row_step = geometry.stride_height;
  args.column_step = geometry.stride_width;
  args.pieces = static_cast<const int32_t*>(pieces.const_data_ptr());
  args.num_pieces = pieces.size(0);
  args.activation = activation;
  check_pieces(args.pieces, args.num_pieces, input.size(1), static_cast<int64_t>(taps.size()));
  const auto& out = args.output;
  const int64_t pixels = out.images * out.height * out.width;
  const int64_t image = out.height * out.width * out.channels;
  const Tensor masked = empty_strided_tensor(
      output, {args.num_pieces, out.images, out.channels, out.height, out.width},
      {out.images * image, image, 1, out.width * out.channels, out.channels});
  if (args.num_pieces * pixels * out.channels == 0) return masked;
  args.masked = static_cast<T*>(masked.mutable_data_ptr());
  // A copied output costs about as much as a multiplication.
  int64_t multiply_adds = args.num_pieces;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* p = args.pieces + 4 * m;
    multiply_adds += int64_t{p[1] - p[0]} * (p[3] - p[2]);
  }
  const auto& kernels = kernels_of<T>(cpu_kernels());
  parallel_kernel<T>(args.num_pieces * out.images, pixels * out.channels * multiply_adds,
                     kernels.ablate_conv2d_scratch(args),
                     [&](int64_t begin, int64_t end, T* scratch) {
                       kernels.ablate_conv2d(args, begin, end, scratch);
                     });
  return masked;
}

Tensor ablate_conv2d_cpu(const Tensor& output, const Tensor& input, const Tensor& weight,
                         const Tensor& pieces, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         const std::string& activation_name) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_dim(kOp, "output", output, 4);
  with_floating_type(kOp, "output", output, [](auto) {});
  check_images("input", input, output);
  check_images("weight", weight, output);
  check_piece_tensor(kOp, pieces, output);
  const ConvolutionGeometry geometry = convolution_geometry(
      kOp, {weight.size(2), weight.size(3)}, stride, padding, dilation, /*groups=*/1);
  check_size(kOp, "input", input, 0, output.size(0));
  check_size(kOp, "weight", weight, 0, output.size(1));
  check_size(kOp, "weight", weight, 1, input.size(1));
  const OutputSize size = output_size(kOp, input.size(2), input.size(3), geometry);
  check_size(kOp, "output", output, 2, size.height);
  check_size(kOp, "output", output, 3, size.width);
  const bool even_taps =
      weight.size(2) == 1 || weight.stride(2) == weight.size(3) * weight.stride(3);
  Tensor result;
  with_floating_type(kOp, "output", output, [&](auto zero) {
    result = run<decltype(zero)>(with_adjacent_channels(output), input,
                                 even_taps ? weight : torch::stable::contiguous(weight),
                                 as_contiguous(pieces), geometry, activation);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("ablate_conv2d", TORCH_BOX(&ablate_conv2d_cpu));
}

}  // namespace fastprune
