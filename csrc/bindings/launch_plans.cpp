#include "launch_plans.h"

#include "../kernels/cuda/block_sparse_linear_plan.h"
#include "../kernels/cuda/block_sparse_linear_weight_gradient_plan.h"
#include "tensor_checks.h"

namespace fastprune {
namespace {

namespace py = pybind11;

py::dict as_dict(const LaunchPlan& plan) {
  const auto triple = [](const uint32_t (&sizes)[3]) {
    return py::make_tuple(sizes[0], sizes[1], sizes[2]);
  };
  py::dict result;
  result["kernel"] = plan.kernel;
  result["grid"] = triple(plan.grid);
  result["block"] = triple(plan.block);
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

py::dict plan_block_sparse_linear(int64_t samples, int64_t in_features, int64_t out_features,
                                  int64_t rows, int64_t cols) {
  const auto plan = plan_block_sparse_linear_cuda({samples, in_features, out_features, rows, cols});
  if (!plan) {
    throw_value_error("block_sparse_linear: no CUDA grid covers samples=", samples,
                      ", in_features=", in_features, ", out_features=", out_features,
                      " with blocks of rows=", rows, ", cols=", cols);
  }
  return as_dict(*plan);
}

py::dict plan_block_sparse_linear_weight_gradient(int64_t samples, int64_t in_features,
                                                  int64_t out_features, int64_t rows, int64_t cols,
                                                  int64_t kept, const std::string& dtype,
                                                  bool allow_tf32, bool aligned) {
  WeightGradientType type = WeightGradientType::kFloat32;
  if (dtype == "float16") {
    type = WeightGradientType::kFloat16;
  } else if (dtype == "bfloat16") {
    type = WeightGradientType::kBfloat16;
  } else if (dtype != "float32") {
    throw_value_error("block_sparse_linear_weight_gradient: `dtype` must be 'float32', 'float16' ",
                      "or 'bfloat16', got '", dtype, "'");
  }
  const auto plan = plan_block_sparse_linear_weight_gradient_cuda(
      {samples, in_features, out_features, rows, cols, kept}, type, allow_tf32, aligned);
  if (!plan) {
    throw_value_error("block_sparse_linear_weight_gradient: no CUDA grid covers samples=", samples,
                      ", in_features=", in_features, ", out_features=", out_features,
                      ", kept=", kept, " with blocks of rows=", rows, ", cols=", cols);
  }
  py::dict result;
  result["product"] = as_dict(plan->product);
  result["sum"] = as_dict(plan->sum);
  result["slices"] = plan->slices;
  result["samples_per_slice"] = plan->samples_per_slice;
  return result;
}

}  // namespace

void define_launch_plans(py::module_& module) {
  module.def("plan_block_sparse_linear_cuda", &plan_block_sparse_linear, py::kw_only(),
             py::arg("samples"), py::arg("in_features"), py::arg("out_features"), py::arg("rows"),
             py::arg("cols"),
             "Returns how the CUDA kernel is launched: kernel, grid, block, shared_bytes.");
  module.def("plan_block_sparse_linear_weight_gradient_cuda",
             &plan_block_sparse_linear_weight_gradient, py::kw_only(), py::arg("samples"),
             py::arg("in_features"), py::arg("out_features"), py::arg("rows"), py::arg("cols"),
             py::arg("kept"), py::arg("dtype"), py::arg("allow_tf32"), py::arg("aligned"),
             "Returns how the CUDA kernels are launched: product, sum, slices, samples_per_slice.");
}

}  // namespace fastprune
