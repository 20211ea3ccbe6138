#include <torch/csrc/stable/library.h>

#include <optional>

#include "../kernels/cpu/dispatch.h"
#include "tensor_checks.h"
#include "tensor_memory.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "ablated_cross_entropy";

void check_arguments(const Tensor& logits, const Tensor& hidden, const Tensor& weight,
                     const Tensor& targets, const Tensor& pieces,
                     const std::optional<Tensor>& sample_weight) {
  check_same_device(kOp, "hidden", hidden, logits);
  check_same_device(kOp, "weight", weight, logits);
  check_same_device(kOp, "targets", targets, logits);
  check_same_device(kOp, "pieces", pieces, logits);
  if (sample_weight) check_same_device(kOp, "sample_weight", *sample_weight, logits);
  check_dim(kOp, "logits", logits, 2);
  check_dim(kOp, "hidden", hidden, 2);
  check_dim(kOp, "weight", weight, 2);
  check_dim(kOp, "targets", targets, 1);
  check_dim(kOp, "pieces", pieces, 2);
  check_dtype(kOp, "hidden", hidden, logits.scalar_type());
  check_dtype(kOp, "weight", weight, logits.scalar_type());
  check_dtype(kOp, "targets", targets, ScalarType::Long);
  check_dtype(kOp, "pieces", pieces, ScalarType::Int);
  check_size(kOp, "hidden", hidden, 0, logits.size(0));
  check_size(kOp, "targets", targets, 0, logits.size(0));
  check_size(kOp, "weight", weight, 0, logits.size(1));
  check_size(kOp, "weight", weight, 1, hidden.size(1));
  check_size(kOp, "pieces", pieces, 1, 4);
  if (sample_weight) {
    check_dim(kOp, "sample_weight", *sample_weight, 1);
    check_dtype(kOp, "sample_weight", *sample_weight, logits.scalar_type());
    check_size(kOp, "sample_weight", *sample_weight, 0, logits.size(0));
  }
}

void check_values(const int64_t* targets, int64_t samples, int64_t classes, int64_t features,
                  const int32_t* pieces, int64_t num_pieces) {
  for (int64_t n = 0; n < samples; ++n) {
    if (targets[n] < 0 || targets[n] >= classes) {
      throw_value_error(kOp, ": `targets` must lie in [0, ", classes, "), got ", targets[n],
                        " for sample ", n);
    }
  }
  for (int64_t m = 0; m < num_pieces; ++m) {
    const int32_t* p = pieces + 4 * m;
    if (p[0] < 0 || p[0] > p[1] || p[1] > classes || p[2] < 0 || p[2] > p[3] || p[3] > features) {
      throw_value_error(kOp, ": `pieces` must be rectangles within [", classes, ", ", features,
                        "], got rows ", p[0], " to ", p[1], " and columns ", p[2], " to ", p[3],
                        " for piece ", m);
    }
  }
}

template <class T>
Tensor run(const Tensor& logits, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
           const Tensor& pieces, const std::optional<Tensor>& sample_weight) {
  AblatedCrossEntropyArgs<T> args;
  args.logits = matrix_view<T>(logits);
  args.hidden = matrix_view<T>(hidden);
  args.weight = matrix_view<T>(weight);
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.sample_weight =
      sample_weight ? static_cast<const T*>(sample_weight->const_data_ptr()) : nullptr;
  args.pieces = static_cast<const int32_t*>(pieces.const_data_ptr());
  args.num_pieces = pieces.size(0);

  const int64_t samples = args.logits.rows, classes = args.logits.cols;
  check_values(args.targets, samples, classes, args.hidden.cols, args.pieces, args.num_pieces);
  const Tensor delta_sum = torch::stable::new_zeros(logits, {args.num_pieces}, ScalarType::Double);
  if (samples == 0 || args.num_pieces == 0) return delta_sum;

  args.padded_samples = (samples + kSamplePadding - 1) / kSamplePadding * kSamplePadding;
  const int64_t chunks = ablated_cross_entropy_chunks(samples);
  const Tensor probabilities = torch::stable::new_empty(logits, {classes, args.padded_samples});
  const Tensor hidden_transposed =
      torch::stable::new_empty(logits, {args.hidden.cols, args.padded_samples});
  const Tensor padded_weight = torch::stable::new_empty(logits, {args.padded_samples});
  const Tensor partial_sums =
      torch::stable::new_empty(logits, {chunks, args.num_pieces}, ScalarType::Double);
  args.probabilities = static_cast<T*>(probabilities.mutable_data_ptr());
  args.hidden_transposed = static_cast<T*>(hidden_transposed.mutable_data_ptr());
  args.padded_weight = static_cast<T*>(padded_weight.mutable_data_ptr());
  args.partial_sums = static_cast<double*>(partial_sums.mutable_data_ptr());

  const auto& kernels = kernels_of<T>(cpu_kernels());
  // Whole cache lines of the transposed arrays belong to one thread.
  torch::stable::parallel_for(
      0, args.padded_samples / kSamplePadding, 4, [&](int64_t begin, int64_t end) {
        kernels.ablated_cross_entropy_prepare(args, begin * kSamplePadding, end * kSamplePadding);
      });
  torch::stable::parallel_for(0, chunks * args.num_pieces, 16, [&](int64_t begin, int64_t end) {
    kernels.ablated_cross_entropy(args, begin, end);
  });
  auto* sums = static_cast<double*>(delta_sum.mutable_data_ptr());
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t m = 0; m < args.num_pieces; ++m) {
      sums[m] += args.partial_sums[chunk * args.num_pieces + m];
    }
  }
  return delta_sum;
}

Tensor ablated_cross_entropy_cpu(const Tensor& logits, const Tensor& hidden, const Tensor& weight,
                                 const Tensor& targets, const Tensor& pieces,
                                 const std::optional<Tensor>& sample_weight) {
  check_arguments(logits, hidden, weight, targets, pieces, sample_weight);
  const Tensor l = with_contiguous_columns(logits), h = with_contiguous_columns(hidden),
               w = with_contiguous_columns(weight), t = torch::stable::contiguous(targets),
               p = torch::stable::contiguous(pieces);
  std::optional<Tensor> s;
  if (sample_weight) s = torch::stable::contiguous(*sample_weight);
  Tensor result;
  with_floating_type(kOp, "logits", logits,
                     [&](auto zero) { result = run<decltype(zero)>(l, h, w, t, p, s); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, library) {
  library.impl("ablated_cross_entropy", TORCH_BOX(&ablated_cross_entropy_cpu));
}

}  // namespace fastprune
