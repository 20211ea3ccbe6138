#include "launch_plans.h"

#include "../kernels/cuda/block_sparse_linear_plan.h"
#include "../kernels/cuda/transposed_structure_plan.h"
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

LinearArithmetic parse_arithmetic(const std::string& name) {
  if (name == "float32") return LinearArithmetic::kF32;
  if (name == "tf32") return LinearArithmetic::kTf32;
  if (name == "float16") return LinearArithmetic::kF16;
  if (name == "bfloat16") return LinearArithmetic::kBf16;
  throw_value_error("`arithmetic` must be 'float32', 'tf32', 'float16' or 'bfloat16', got '", name,
                    "'");
}

py::dict plan_block_sparse_linear(int64_t samples, int64_t in_features, int64_t out_features,
                                  int64_t rows, int64_t cols, const std::string& arithmetic,
                                  bool input_gradient, bool aligned, int64_t multiprocessors) {
  const BlockProductShape forward{samples, in_features, out_features, cols,
                                  rows,    false,       aligned,      multiprocessors};
  const BlockProductShape gradient{samples, out_features, in_features, rows,
                                   cols,    true,         aligned,     multiprocessors};
  const auto plan =
      plan_block_product(input_gradient ? gradient : forward, parse_arithmetic(arithmetic));
  if (!plan) {
    throw_value_error("block_sparse_linear: no CUDA grid covers samples=", samples,
                      ", in_features=", in_features, ", out_features=", out_features,
                      " with blocks of rows=", rows, ", cols=", cols);
  }
  return as_dict(plan->launch);
}

py::dict plan_transposed(int64_t block_cols) {
  const auto plan = plan_transposed_structure(block_cols);
  if (!plan) {
    throw_value_error("transposed_structure: no CUDA grid covers block_cols=", block_cols);
  }
  return as_dict(*plan);
}

}  // namespace

void define_launch_plans(py::module_& module) {
  module.def("plan_block_sparse_linear_cuda", &plan_block_sparse_linear, py::kw_only(),
             py::arg("samples"), py::arg("in_features"), py::arg("out_features"), py::arg("rows"),
             py::arg("cols"), py::arg("arithmetic") = "float32", py::arg("input_gradient") = false,
             py::arg("aligned") = true, py::arg("multiprocessors") = 132,
             "Returns how the CUDA kernel is launched: kernel, grid, block, shared_bytes.");
  module.def("plan_transposed_structure_cuda", &plan_transposed, py::kw_only(),
             py::arg("block_cols"),
             "Returns how the CUDA kernel is launched: kernel, grid, block, shared_bytes.");
}

}  // namespace fastprune
