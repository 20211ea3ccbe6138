#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/dispatch.h"
#include "ablation_checks.h"
#include "parallel_kernel.h"
#include "tensor_memory.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "ablate_linear";

template <class T>
Tensor run(const Tensor& output, const Tensor& input, const Tensor& weight, const Tensor& pieces) {
  AblateLinearArgs<T> args;
  args.output = matrix_view<T>(output);
  args.input = matrix_view<T>(input);
  args.weight = matrix_view<T>(weight);
  args.pieces = static_cast<const int32_t*>(pieces.const_data_ptr());
  args.num_pieces = pieces.size(0);
  check_pieces(kOp, args.pieces, args.num_pieces, args.weight.rows, args.weight.cols);
  const int64_t samples = args.output.rows, out_features = args.output.cols;
  const Tensor masked = empty_tensor(output, {args.num_pieces, samples, out_features});
  args.masked = static_cast<T*>(masked.mutable_data_ptr());
  // A copied output costs about as much as a multiplication.
  int64_t multiply_adds = args.num_pieces * out_features;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* p = args.pieces + 4 * m;
    multiply_adds += int64_t{p[1] - p[0]} * (p[3] - p[2]);
  }
  const auto& kernels = kernels_of<T>(cpu_kernels());
  parallel_kernel<T>(args.num_pieces * samples, samples * multiply_adds,
                     kernels.ablate_linear_scratch(args),
                     [&](int64_t begin, int64_t end, T* scratch) {
                       kernels.ablate_linear(args, begin, end, scratch);
                     });
  return masked;
}

Tensor ablate_linear_cpu(const Tensor& output, const Tensor& input, const Tensor& weight,
                         const Tensor& pieces) {
  check_ablate_linear(kOp, output, input, weight, pieces);
  Tensor result;
  with_floating_type(kOp, "output", output, [&](auto zero) {
    result = run<decltype(zero)>(with_contiguous_columns(output), with_contiguous_columns(input),
                                 with_contiguous_columns(weight), as_contiguous(pieces));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("ablate_linear", TORCH_BOX(&ablate_linear_cpu));
}

}  // namespace fastprune
