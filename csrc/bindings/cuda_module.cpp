// The pybind11 module `_C_cuda`: importing it registers the CUDA kernels with torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "CUDA kernels of fastprune; importing it registers them with torch.";
  module.attr("version") = FASTPRUNE_VERSION;
  module.attr("cuda_toolkit") =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  module.attr("architectures") = FASTPRUNE_CUDA_ARCHITECTURES;
  module.attr("built_with_torch") = FASTPRUNE_BUILT_WITH_TORCH;
}
