// The names of the activations in the ops' schemas.
#pragma once

#include <string>

#include "../kernels/types.h"
#include "tensor_checks.h"

namespace fastprune {

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  throw_value_error(
      op, ": `activation` must be 'none', 'relu', 'relu6', 'gelu', 'gelu_tanh' or 'silu', got '",
      name, "'");
}

}  // namespace fastprune
