#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/ablate_linear.h"
#include "ablation_checks.h"
#include "cuda_stream.h"
#include "tensor_memory.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "ablate_linear";

// Pieces are not read here: that would make the host wait for the device. Those out of range give
// NaN.
Tensor ablate_linear_cuda(const Tensor& output, const Tensor& input, const Tensor& weight,
                          const Tensor& pieces) {
  check_ablate_linear(kOp, output, input, weight, pieces);
  check_float_on_cuda(kOp, "output", output);
  const auto guard = device_guard(output);
  const Tensor outputs = with_contiguous_columns(output), inputs = with_contiguous_columns(input);
  const Tensor weights = with_contiguous_columns(weight), rectangles = as_contiguous(pieces);
  const Tensor masked = empty_tensor(output, {pieces.size(0), output.size(0), output.size(1)});

  AblateLinearArgs<float> args;
  args.output = matrix_view<float>(outputs);
  args.input = matrix_view<float>(inputs);
  args.weight = matrix_view<float>(weights);
  args.pieces = static_cast<const int32_t*>(rectangles.const_data_ptr());
  args.num_pieces = pieces.size(0);
  args.masked = static_cast<float*>(masked.mutable_data_ptr());
  check_launch(launch_ablate_linear(args, current_stream(output)), "ablate_linear_f32", output,
               "output ", output, ", input ", input, ", pieces ", pieces);
  return masked;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, library) {
  library.impl("ablate_linear", TORCH_BOX(&ablate_linear_cuda));
}

}  // namespace fastprune
