#include <pybind11/stl.h>

#include "../kernels/cuda/block_sparse_conv2d_plan.h"
#include "../kernels/cuda/block_sparse_conv2d_structure_plan.h"
#include "block_sparse_conv2d.h"
#include "launch_plans.h"

namespace fastprune {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "block_sparse_conv2d";

// The sizes of a call as Python gives them.
struct Call {
  int64_t images, in_channels, height, width, out_channels;
  std::vector<int64_t> kernel_size, stride, padding, dilation;
  int64_t groups, rows, cols, kept;
  std::string arithmetic;
  bool aligned, aligned_input;
  int64_t multiprocessors;

  ConvolutionShape shape() const {
    const ConvolutionGeometry geometry =
        convolution_geometry(kOp, kernel_size, stride, padding, dilation, groups);
    const OutputSize output = output_size(kOp, height, width, geometry);
    return {images,   in_channels, height, width, out_channels, output.height, output.width,
            geometry, rows,        cols,   kept,  aligned,      aligned_input, multiprocessors};
  }
};

template <class T>
py::bytes as_bytes(const T& plain) {
  return {reinterpret_cast<const char*>(&plain), sizeof(T)};
}

// With what the kernel's arguments hold besides pointers.
py::dict as_dict(const std::optional<ConvolutionPlan>& plan, const Call& call) {
  if (!plan) {
    throw_value_error(kOp, ": no CUDA kernel or grid covers images=", call.images,
                      ", in_channels=", call.in_channels, ", height=", call.height,
                      ", width=", call.width, ", out_channels=", call.out_channels,
                      ", groups=", call.groups, ", kept=", call.kept,
                      " with blocks of rows=", call.rows, ", cols=", call.cols);
  }
  py::dict result = as_dict(plan->launch);
  result["lists"] = plan->lists;
  result["input_geometry"] = as_bytes(plan->input);
  result["output_geometry"] = as_bytes(plan->output);
  return result;
}

py::dict plan_structure(const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& dilation, int64_t lists) {
  check_counts(kOp, "kernel_size", kernel_size, 2, 1);
  check_counts(kOp, "stride", stride, 2, 1);
  check_counts(kOp, "dilation", dilation, 2, 1);
  const auto plan = plan_convolution_structure(lists, kernel_size[0] * kernel_size[1]);
  if (!plan) {
    throw_value_error(kOp, ": no CUDA grid covers lists=", lists, " of ", kernel_size[0], " x ",
                      kernel_size[1], " taps");
  }
  py::dict result = as_dict(*plan);
  result["row_classes"] = as_bytes(tap_classes(kernel_size[0], stride[0], dilation[0]));
  result["column_classes"] = as_bytes(tap_classes(kernel_size[1], stride[1], dilation[1]));
  return result;
}

}  // namespace

void define_convolution_plans(py::module_& module) {
  py::class_<Call>(module, "Conv2dCall", "The sizes of a call of block_sparse_conv2d.")
      .def(py::init([](int64_t images, int64_t in_channels, int64_t height, int64_t width,
                       int64_t out_channels, std::vector<int64_t> kernel_size,
                       std::vector<int64_t> stride, std::vector<int64_t> padding,
                       std::vector<int64_t> dilation, int64_t groups, int64_t rows, int64_t cols,
                       int64_t kept, std::string arithmetic, bool aligned, bool aligned_input,
                       int64_t multiprocessors) {
             return Call{images, in_channels, height,   width,         out_channels,   kernel_size,
                         stride, padding,     dilation, groups,        rows,           cols,
                         kept,   arithmetic,  aligned,  aligned_input, multiprocessors};
           }),
           py::kw_only(), py::arg("images"), py::arg("in_channels"), py::arg("height"),
           py::arg("width"), py::arg("out_channels"), py::arg("kernel_size"),
           py::arg("stride") = std::vector<int64_t>{1, 1},
           py::arg("padding") = std::vector<int64_t>{0, 0, 0, 0},
           py::arg("dilation") = std::vector<int64_t>{1, 1}, py::arg("groups") = 1,
           py::arg("rows") = 16, py::arg("cols") = 16, py::arg("kept") = 0,
           py::arg("arithmetic") = "float32", py::arg("aligned") = true,
           py::arg("aligned_input") = true, py::arg("multiprocessors") = 132);
  module.def(
      "plan_block_sparse_conv2d_cuda",
      [](const Call& call) {
        return as_dict(plan_block_sparse_conv2d(call.shape(), parse_arithmetic(call.arithmetic)),
                       call);
      },
      py::arg("call"),
      "Returns how the CUDA kernel is launched, its lists, and its geometry as bytes.");
  module.def(
      "plan_block_sparse_conv2d_input_gradient_cuda",
      [](const Call& call, int64_t row_phase, int64_t column_phase) {
        return as_dict(
            plan_block_sparse_conv2d_input_gradient(call.shape(), parse_arithmetic(call.arithmetic),
                                                    row_phase, column_phase),
            call);
      },
      py::arg("call"), py::arg("row_phase"), py::arg("column_phase"),
      "Returns the same for the inputs whose row and column modulo the stride are the phase.");
  module.def("plan_block_sparse_conv2d_structure_cuda", &plan_structure, py::kw_only(),
             py::arg("kernel_size"), py::arg("stride"), py::arg("dilation"), py::arg("lists"),
             "Returns how the lists of the input gradient are made, and the classes of taps.");
}

}  // namespace fastprune
