// What the bindings of the ablation ops share: checks of samples, targets and pieces.
#pragma once

#include <optional>

#include "tensor_checks.h"

namespace fastprune {

// A matrix with the device and the dtype of another tensor.
inline void check_matrix(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& like) {
  check_same_device(op, name, tensor, like);
  check_dim(op, name, tensor, 2);
  check_dtype(op, name, tensor, like.scalar_type());
}

inline void check_piece_tensor(const char* op, const Tensor& pieces, const Tensor& like) {
  check_same_device(op, "pieces", pieces, like);
  check_dim(op, "pieces", pieces, 2);
  check_dtype(op, "pieces", pieces, ScalarType::Int);
  check_size(op, "pieces", pieces, 1, 4);
}

// All that a cross-entropy takes besides the layers.
inline void check_cross_entropy_arguments(const char* op, const Tensor& logits,
                                          const Tensor& targets, const Tensor& pieces,
                                          const std::optional<Tensor>& sample_weight) {
  check_dim(op, "logits", logits, 2);
  // First, so that half precision is refused for what it is and not asked of the others.
  with_floating_type(op, "logits", logits, [](auto) {});
  check_same_device(op, "targets", targets, logits);
  check_dim(op, "targets", targets, 1);
  check_dtype(op, "targets", targets, ScalarType::Long);
  check_size(op, "targets", targets, 0, logits.size(0));
  check_piece_tensor(op, pieces, logits);
  if (sample_weight) {
    check_same_device(op, "sample_weight", *sample_weight, logits);
    check_dim(op, "sample_weight", *sample_weight, 1);
    check_dtype(op, "sample_weight", *sample_weight, logits.scalar_type());
    check_size(op, "sample_weight", *sample_weight, 0, logits.size(0));
  }
}

inline void check_ablated_cross_entropy(const char* op, const Tensor& logits, const Tensor& hidden,
                                        const Tensor& weight, const Tensor& targets,
                                        const Tensor& pieces,
                                        const std::optional<Tensor>& sample_weight) {
  check_cross_entropy_arguments(op, logits, targets, pieces, sample_weight);
  check_matrix(op, "hidden", hidden, logits);
  check_matrix(op, "weight", weight, logits);
  check_size(op, "hidden", hidden, 0, logits.size(0));
  check_size(op, "weight", weight, 0, logits.size(1));
  check_size(op, "weight", weight, 1, hidden.size(1));
}

inline void check_ablated_mlp_cross_entropy(const char* op, const Tensor& logits,
                                            const Tensor& input, const Tensor& pre_activation,
                                            const Tensor& first_weight, const Tensor& second_weight,
                                            const Tensor& targets, const Tensor& pieces,
                                            const std::optional<Tensor>& sample_weight) {
  check_cross_entropy_arguments(op, logits, targets, pieces, sample_weight);
  check_matrix(op, "input", input, logits);
  check_matrix(op, "pre_activation", pre_activation, logits);
  check_matrix(op, "first_weight", first_weight, logits);
  check_matrix(op, "second_weight", second_weight, logits);
  check_size(op, "input", input, 0, logits.size(0));
  check_size(op, "pre_activation", pre_activation, 0, logits.size(0));
  check_size(op, "first_weight", first_weight, 0, pre_activation.size(1));
  check_size(op, "first_weight", first_weight, 1, input.size(1));
  check_size(op, "second_weight", second_weight, 0, logits.size(1));
  check_size(op, "second_weight", second_weight, 1, pre_activation.size(1));
}

inline void check_ablate_linear(const char* op, const Tensor& output, const Tensor& input,
                                const Tensor& weight, const Tensor& pieces) {
  check_dim(op, "output", output, 2);
  with_floating_type(op, "output", output, [](auto) {});
  check_matrix(op, "input", input, output);
  check_matrix(op, "weight", weight, output);
  check_piece_tensor(op, pieces, output);
  check_size(op, "input", input, 0, output.size(0));
  check_size(op, "weight", weight, 0, output.size(1));
  check_size(op, "weight", weight, 1, input.size(1));
}

// The CUDA kernels of the ablation ops are float32.
inline void check_float_on_cuda(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Float) {
    throw_value_error(op, ": on CUDA `", name, "` must have dtype Float, got ",
                      dtype_text(tensor.scalar_type()));
  }
}

// On the CPU alone, as check_pieces: on CUDA, where reading them would make the host wait, the
// kernels give NaN instead.
inline void check_targets(const char* op, const int64_t* targets, int64_t samples,
                          int64_t classes) {
  for (int64_t n = 0; n < samples; ++n) {
    if (targets[n] < 0 || targets[n] >= classes) {
      throw_value_error(op, ": `targets` must lie in [0, ", classes, "), got ", targets[n],
                        " for sample ", n);
    }
  }
}

// Rectangles of a weight of rows x cols.
inline void check_pieces(const char* op, const int32_t* pieces, int64_t num_pieces, int64_t rows,
                         int64_t cols) {
  for (int64_t m = 0; m < num_pieces; ++m) {
    const int32_t* p = pieces + 4 * m;
    if (p[0] < 0 || p[0] > p[1] || p[1] > rows || p[2] < 0 || p[2] > p[3] || p[3] > cols) {
      throw_value_error(op, ": `pieces` must be rectangles within [", rows, ", ", cols,
                        "], got rows ", p[0], " to ", p[1], " and columns ", p[2], " to ", p[3],
                        " for piece ", m);
    }
  }
}

}  // namespace fastprune
