#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/dispatch.h"
#include "activation_names.h"
#include "channels_last.h"
#include "parallel_kernel.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "updated_conv2d";

void check_images(const char* name, const Tensor& tensor, const Tensor& like) {
  check_same_device(kOp, name, tensor, like);
  check_dtype(kOp, name, tensor, like.scalar_type());
  check_dim(kOp, name, tensor, like.dim());
}

void check_same_shape(const char* name, const Tensor& tensor, const Tensor& like) {
  check_images(name, tensor, like);
  for (int64_t d = 0; d < like.dim(); ++d) check_size(kOp, name, tensor, d, like.size(d));
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
void run(const Tensor& known, const Tensor& input, const Tensor& new_input,
         const Tensor& winograd_weight, const std::optional<Tensor>& addend,
         const std::optional<Tensor>& new_addend, int64_t padding_top, int64_t padding_left,
         Activation activation, const Tensor& output) {
  UpdatedConv2dArgs<T> args;
  args.known = data_of<T>(known);
  args.input = data_of<T>(input);
  args.new_input = data_of<T>(new_input);
  args.addend = addend ? data_of<T>(*addend) : nullptr;
  args.new_addend = new_addend ? data_of<T>(*new_addend) : nullptr;
  args.weight = data_of<T>(winograd_weight);
  args.images = known.size(0);
  args.in_height = input.size(2);
  args.in_width = input.size(3);
  args.in_channels = input.size(1);
  args.height = known.size(2);
  args.width = known.size(3);
  args.out_channels = known.size(1);
  args.padding_top = padding_top;
  args.padding_left = padding_left;
  args.activation = activation;
  args.output = static_cast<T*>(output.mutable_data_ptr());
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const UpdatedConv2dWork work = kernels.plan_updated_conv2d(args);
  const int64_t multiply_adds = kWinogradPoints * work.tiles * args.in_channels * args.out_channels;
  parallel_kernel<T>(work.total, multiply_adds, work.scratch_size,
                     [&](int64_t begin, int64_t end, T* scratch) {
                       kernels.updated_conv2d(args, work, begin, end, scratch);
                     });
}

Tensor updated_conv2d_cpu(const Tensor& known, const Tensor& input, const Tensor& new_input,
                          const Tensor& winograd_weight, const std::optional<Tensor>& addend,
                          const std::optional<Tensor>& new_addend,
                          const std::vector<int64_t>& padding, const std::string& activation_name) {
  const Activation activation = parse_activation(kOp, activation_name);
  check_dim(kOp, "known", known, 4);
  with_floating_type(kOp, "known", known, [](auto) {});
  check_images("input", input, known);
  check_size(kOp, "input", input, 0, known.size(0));
  check_same_shape("new_input", new_input, input);
  check_images("winograd_weight", winograd_weight, known);
  check_size(kOp, "winograd_weight", winograd_weight, 0, kWinogradPoints);
  check_size(kOp, "winograd_weight", winograd_weight, 1,
             ceil_divide(known.size(1), kWinogradOutputs));
  check_size(kOp, "winograd_weight", winograd_weight, 2, input.size(1));
  check_size(kOp, "winograd_weight", winograd_weight, 3, kWinogradOutputs);
  if (addend.has_value() != new_addend.has_value()) {
    throw_value_error(kOp, ": `new_addend` must be given with `addend`, and only with it");
  }
  std::optional<Tensor> before, after;
  if (addend) {
    check_same_shape("addend", *addend, known);
    check_same_shape("new_addend", *new_addend, known);
    before = as_channels_last(*addend);
    after = as_channels_last(*new_addend);
  }
  const ConvolutionGeometry geometry =
      convolution_geometry(kOp, {3, 3}, {1, 1}, padding, {1, 1}, /*groups=*/1);
  const OutputSize size = output_size(kOp, input.size(2), input.size(3), geometry);
  check_size(kOp, "known", known, 2, size.height);
  check_size(kOp, "known", known, 3, size.width);
  const int64_t channels = known.size(1);
  const Tensor output = empty_strided_tensor(
      known, {known.size(0), channels, size.height, size.width},
      {size.height * size.width * channels, 1, size.width * channels, channels});
  with_floating_type(kOp, "known", known, [&](auto zero) {
    run<decltype(zero)>(as_channels_last(known), as_channels_last(input),
                        as_channels_last(new_input), as_contiguous(winograd_weight), before, after,
                        geometry.padding_top, geometry.padding_left, activation, output);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("updated_conv2d", TORCH_BOX(&updated_conv2d_cpu));
}

}  // namespace fastprune
