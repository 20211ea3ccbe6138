#include "launch_plans.h"

#include <pybind11/stl.h>

#include <array>

#include "../kernels/cuda/ablate_linear_plan.h"
#include "../kernels/cuda/ablated_cross_entropy_plan.h"
#include "../kernels/cuda/ablated_mlp_cross_entropy_plan.h"
#include "../kernels/cuda/block_sparse_conv2d_weight_gradient_plan.h"
#include "../kernels/cuda/block_sparse_linear_plan.h"
#include "../kernels/cuda/transposed_structure_plan.h"
#include "tensor_checks.h"

namespace fastprune {

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

namespace {

py::dict plan_block_sparse_linear(int64_t samples, int64_t in_features, int64_t out_features,
                                  int64_t rows, int64_t cols, int64_t kept,
                                  const std::string& arithmetic, bool input_gradient, bool aligned,
                                  bool aligned_input, int64_t multiprocessors) {
  const BlockProductShape forward{samples, in_features, out_features,  cols,           rows, kept,
                                  false,   aligned,     aligned_input, multiprocessors};
  const BlockProductShape gradient{samples, out_features, in_features,   rows,           cols, kept,
                                   true,    aligned,      aligned_input, multiprocessors};
  const auto plan =
      plan_block_product(input_gradient ? gradient : forward, parse_arithmetic(arithmetic));
  if (!plan) {
    throw_value_error("block_sparse_linear: no CUDA grid covers samples=", samples,
                      ", in_features=", in_features, ", out_features=", out_features,
                      ", kept=", kept, " with blocks of rows=", rows, ", cols=", cols);
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

WeightGradientType parse_weight_gradient_type(const char* op, const std::string& dtype) {
  if (dtype == "float32") return WeightGradientType::kFloat32;
  if (dtype == "float16") return WeightGradientType::kFloat16;
  if (dtype == "bfloat16") return WeightGradientType::kBfloat16;
  throw_value_error(op, ": `dtype` must be 'float32', 'float16' or 'bfloat16', got '", dtype, "'");
}

py::dict as_dict(const BlockSparseLinearWeightGradientPlan& plan) {
  py::dict result;
  result["product"] = as_dict(plan.product);
  result["sum"] = as_dict(plan.sum);
  result["slices"] = plan.slices;
  result["samples_per_slice"] = plan.samples_per_slice;
  return result;
}

py::dict plan_block_sparse_linear_weight_gradient(int64_t samples, int64_t in_features,
                                                  int64_t out_features, int64_t rows, int64_t cols,
                                                  int64_t kept, const std::string& dtype,
                                                  bool allow_tf32, bool aligned) {
  const auto plan = plan_block_sparse_linear_weight_gradient_cuda(
      {samples, in_features, out_features, rows, cols, kept},
      parse_weight_gradient_type("block_sparse_linear_weight_gradient", dtype), allow_tf32,
      aligned);
  if (!plan) {
    throw_value_error("block_sparse_linear_weight_gradient: no CUDA grid covers samples=", samples,
                      ", in_features=", in_features, ", out_features=", out_features,
                      ", kept=", kept, " with blocks of rows=", rows, ", cols=", cols);
  }
  return as_dict(*plan);
}

// input_size: images, channels, height, width. padding: top, bottom, left, right.
py::dict plan_block_sparse_conv2d_weight_gradient(
    const std::array<int64_t, 4>& input_size, int64_t out_channels,
    const std::array<int64_t, 2>& output_size, const std::array<int64_t, 2>& kernel_size,
    const std::array<int64_t, 2>& stride, const std::array<int64_t, 4>& padding,
    const std::array<int64_t, 2>& dilation, int64_t groups, int64_t rows, int64_t cols,
    int64_t kept, const std::string& dtype, bool allow_tf32, bool aligned) {
  constexpr const char* kOp = "block_sparse_conv2d_weight_gradient";
  const ConvolutionGeometry geometry{kernel_size[0], kernel_size[1], stride[0],  stride[1],
                                     padding[0],     padding[1],     padding[2], padding[3],
                                     dilation[0],    dilation[1],    groups};
  const auto plan = plan_block_sparse_conv2d_weight_gradient_cuda(
      {input_size[0], input_size[1], input_size[2], input_size[3], out_channels, output_size[0],
       output_size[1], geometry, rows, cols, kept},
      parse_weight_gradient_type(kOp, dtype), allow_tf32, aligned);
  if (!plan) {
    throw_value_error(kOp, ": no CUDA grid covers images=", input_size[0],
                      ", in_channels=", input_size[1], ", height=", input_size[2],
                      ", width=", input_size[3], ", out_channels=", out_channels, ", kept=", kept,
                      " with blocks of rows=", rows, ", cols=", cols);
  }
  py::dict result = as_dict(plan->launch);
  const ConvolutionPositions& p = plan->positions;
  result["pointwise"] = plan->pointwise;
  // In the order of ConvolutionPositions.
  result["positions"] = py::make_tuple(
      p.height, p.width, p.output_height, p.output_width, p.row_step, p.column_step, p.kernel_width,
      p.padding_top, p.padding_left, p.dilation_height, p.dilation_width, p.row_span, p.column_span,
      p.advance_row, p.advance_column, p.advance_pixels, p.next_row_pixels, p.next_image_pixels);
  return result;
}

py::dict checked(const std::optional<LaunchPlan>& plan, const char* kernel) {
  if (!plan) throw_value_error(kernel, ": no CUDA grid covers these sizes");
  return as_dict(*plan);
}

// With the span of samples that one thread block sums, and the number of spans.
template <class Plan>
py::dict with_spans(const std::optional<Plan>& plan, const char* kernel) {
  if (!plan) throw_value_error(kernel, ": no CUDA grid covers these sizes");
  py::dict result = as_dict(plan->launch);
  result["span"] = plan->grid.span;
  result["spans"] = plan->grid.spans;
  return result;
}

void define_loss_plans(py::module_& module) {
  module.def(
      "plan_transpose_to_panel_cuda",
      [](int64_t rows, int64_t cols, int64_t multiple) {
        return checked(plan_transpose_to_panel(rows, cols, multiple), "transpose_to_panel_f32");
      },
      py::kw_only(), py::arg("rows"), py::arg("cols"), py::arg("multiple"),
      "Returns how a matrix is transposed for the loss-delta kernels.");
  module.def(
      "plan_softmax_panel_cuda",
      [](int64_t samples, int64_t classes) {
        return checked(plan_softmax_panel(samples, classes), "softmax_panel_f32");
      },
      py::kw_only(), py::arg("samples"), py::arg("classes"),
      "Returns how the probabilities for the loss-delta kernels are computed.");
  module.def(
      "plan_sum_spans_cuda",
      [](int64_t num_pieces) { return checked(plan_sum_spans(num_pieces), "sum_spans_f64"); },
      py::kw_only(), py::arg("num_pieces"), "Returns how the sums of spans are added.");
  module.def(
      "plan_ablated_cross_entropy_cuda",
      [](int64_t samples, int64_t features, int64_t classes, int64_t num_pieces) {
        return with_spans(plan_ablated_cross_entropy_cuda(samples, features, classes, num_pieces),
                          "ablated_cross_entropy_f32");
      },
      py::kw_only(), py::arg("samples"), py::arg("features"), py::arg("classes"),
      py::arg("num_pieces"),
      "Returns how the CUDA kernel is launched, and the spans of samples that it sums.");
  module.def(
      "plan_ablated_mlp_cross_entropy_cuda",
      [](int64_t samples, int64_t in_features, int64_t hidden, int64_t classes, int64_t num_pieces,
         int32_t activation) {
        return with_spans(plan_ablated_mlp_cross_entropy_cuda(
                              {samples, in_features, hidden, classes, num_pieces, activation}),
                          "ablated_mlp_cross_entropy");
      },
      py::kw_only(), py::arg("samples"), py::arg("in_features"), py::arg("hidden"),
      py::arg("classes"), py::arg("num_pieces"), py::arg("activation"),
      "Returns how the CUDA kernel is launched, and the spans of samples that it sums.");
  module.def(
      "plan_ablate_linear_cuda",
      [](int64_t samples, int64_t in_features, int64_t out_features, int64_t num_pieces) {
        return checked(plan_ablate_linear_cuda(samples, in_features, out_features, num_pieces),
                       "ablate_linear_f32");
      },
      py::kw_only(), py::arg("samples"), py::arg("in_features"), py::arg("out_features"),
      py::arg("num_pieces"), "Returns how the CUDA kernel is launched.");
}

}  // namespace

void define_launch_plans(py::module_& module) {
  module.def("plan_block_sparse_linear_cuda", &plan_block_sparse_linear, py::kw_only(),
             py::arg("samples"), py::arg("in_features"), py::arg("out_features"), py::arg("rows"),
             py::arg("cols"), py::arg("kept") = 0, py::arg("arithmetic") = "float32",
             py::arg("input_gradient") = false, py::arg("aligned") = true,
             py::arg("aligned_input") = true, py::arg("multiprocessors") = 132,
             "Returns how the CUDA kernel is launched: kernel, grid, block, shared_bytes.");
  module.def("plan_transposed_structure_cuda", &plan_transposed, py::kw_only(),
             py::arg("block_cols"),
             "Returns how the CUDA kernel is launched: kernel, grid, block, shared_bytes.");
  module.def("plan_block_sparse_linear_weight_gradient_cuda",
             &plan_block_sparse_linear_weight_gradient, py::kw_only(), py::arg("samples"),
             py::arg("in_features"), py::arg("out_features"), py::arg("rows"), py::arg("cols"),
             py::arg("kept"), py::arg("dtype"), py::arg("allow_tf32"), py::arg("aligned"),
             "Returns how the CUDA kernels are launched: product, sum, slices, samples_per_slice.");
  module.def("plan_block_sparse_conv2d_weight_gradient_cuda",
             &plan_block_sparse_conv2d_weight_gradient, py::kw_only(), py::arg("input_size"),
             py::arg("out_channels"), py::arg("output_size"), py::arg("kernel_size"),
             py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
             py::arg("rows"), py::arg("cols"), py::arg("kept"), py::arg("dtype"),
             py::arg("allow_tf32"), py::arg("aligned"),
             "Returns the same for a convolution, and the walk over its output positions.");
  define_loss_plans(module);
  define_convolution_plans(module);
}

}  // namespace fastprune
