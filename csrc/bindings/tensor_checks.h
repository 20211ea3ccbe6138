// Checks that every binding makes before a kernel sees a pointer. Each throws
// std::invalid_argument, which reaches Python as ValueError, and names the argument, what was
// expected and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void throw_value_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

inline const char* dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline void check_dtype(const char* op, const char* name, const Tensor& tensor,
                        ScalarType expected) {
  if (tensor.scalar_type() != expected) {
    throw_value_error(op, ": `", name, "` must have dtype ", dtype_text(expected), ", got ",
                      dtype_text(tensor.scalar_type()));
  }
}

// Calls function(float{}) or function(double{}), by the dtype of a tensor.
template <class Function>
void with_floating_type(const char* op, const char* name, const Tensor& tensor,
                        const Function& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    default:
      throw_value_error(op, ": `", name, "` must have dtype Float or Double, got ",
                        dtype_text(tensor.scalar_type()));
  }
}

// What the CPU multiplies and accumulates in: float32 for tensors of 16 bits.
inline ScalarType computed_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return ScalarType::Double;
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return ScalarType::Float;
    default:
      throw_value_error(op, ": `", name, "` must have dtype Float, Double, Half or BFloat16, got ",
                        dtype_text(tensor.scalar_type()));
  }
}

inline bool is_half(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t expected) {
  if (tensor.dim() != expected) {
    throw_value_error(op, ": `", name, "` must have ", expected, " dimensions, got shape ",
                      shape_text(tensor));
  }
}

inline void check_size(const char* op, const char* name, const Tensor& tensor, int64_t dim,
                       int64_t expected) {
  if (tensor.size(dim) != expected) {
    throw_value_error(op, ": `", name, "` must have size ", expected, " in dimension ", dim,
                      ", got shape ", shape_text(tensor));
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& reference) {
  const bool same = tensor.is_cpu() == reference.is_cpu() &&
                    tensor.is_cuda() == reference.is_cuda() &&
                    tensor.get_device_index() == reference.get_device_index();
  if (!same) {
    throw_value_error(op, ": `", name, "` must be on the device of the first argument");
  }
}

}  // namespace fastprune
