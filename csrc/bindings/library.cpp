// The schemas of all ops, and the pybind11 module `_C`, which carries what holds no tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/dispatch.h"
#include "launch_plans.h"

STABLE_TORCH_LIBRARY(fastprune, library) {
  library.def(
      "block_sparse_linear(Tensor input, Tensor packed_values, Tensor crow_indices, "
      "Tensor col_indices, Tensor? bias, int out_features, str activation, "
      "bool allow_tf32=False) -> Tensor");
  library.def(
      "block_sparse_linear_inference(Tensor input, Tensor packed_values, Tensor crow_indices, "
      "Tensor col_indices, Tensor? bias, int out_features, str activation, "
      "bool allow_tf32=False) -> Tensor");
  library.def(
      "block_sparse_linear_input_gradient(Tensor grad_output, Tensor packed_values, "
      "Tensor crow_indices, Tensor col_indices, int in_features, bool allow_tf32=False) -> Tensor");
  library.def(
      "block_sparse_linear_weight_gradient(Tensor grad_output, Tensor input, Tensor crow_indices, "
      "Tensor col_indices, int rows, int cols, bool allow_tf32=False) -> Tensor");
  library.def(
      "block_sparse_conv2d(Tensor input, Tensor packed_values, Tensor crow_indices, "
      "Tensor col_indices, Tensor? bias, int out_channels, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, str activation, bool allow_tf32=False) -> "
      "Tensor");
  library.def(
      "block_sparse_conv2d_inference(Tensor input, Tensor packed_values, Tensor crow_indices, "
      "Tensor col_indices, Tensor? bias, int out_channels, int[] geometry, str activation, "
      "bool allow_tf32=False) -> Tensor");
  library.def(
      "block_sparse_conv2d_input_gradient(Tensor grad_output, Tensor packed_values, "
      "Tensor crow_indices, Tensor col_indices, int[] input_size, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool allow_tf32=False) -> Tensor");
  library.def(
      "block_sparse_conv2d_weight_gradient(Tensor grad_output, Tensor input, Tensor crow_indices, "
      "Tensor col_indices, int rows, int cols, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, bool allow_tf32=False) -> Tensor");
  library.def(
      "ablated_cross_entropy(Tensor logits, Tensor hidden, Tensor weight, Tensor targets, "
      "Tensor pieces, Tensor? sample_weight) -> Tensor");
  library.def(
      "ablated_mlp_cross_entropy(Tensor logits, Tensor input, Tensor pre_activation, "
      "Tensor first_weight, Tensor second_weight, Tensor targets, Tensor pieces, str activation, "
      "Tensor? sample_weight) -> Tensor");
  library.def("ablate_linear(Tensor output, Tensor input, Tensor weight, Tensor pieces) -> Tensor");
  library.def(
      "ablate_conv2d(Tensor output, Tensor input, Tensor weight, Tensor pieces, int[] stride, "
      "int[] padding, int[] dilation, str activation) -> Tensor");
  library.def(
      "updated_conv2d(Tensor known, Tensor input, Tensor new_input, Tensor winograd_weight, "
      "Tensor? addend, Tensor? new_addend, int[] padding, str activation) -> Tensor");
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of fastprune; importing it registers the ops with torch.";
  module.attr("version") = FASTPRUNE_VERSION;
  module.attr("compiler") = FASTPRUNE_COMPILER;
  module.attr("built_with_torch") = FASTPRUNE_BUILT_WITH_TORCH;
  module.attr("cuda_status") = FASTPRUNE_CUDA_STATUS;
  module.def("built_cpu_isas", &fastprune::built_cpu_isas);
  module.def("supported_cpu_isas", &fastprune::supported_cpu_isas);
  module.def("cpu_isa", [] { return std::string(fastprune::cpu_kernels().isa); });
  module.def("set_cpu_isa", &fastprune::set_cpu_isa, pybind11::arg("name"));
  fastprune::define_launch_plans(module);
}
