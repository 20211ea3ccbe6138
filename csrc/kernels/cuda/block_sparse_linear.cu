// The plain kernels of block_sparse_linear, for any block, and the launchers of all its kernels.
#include "block_sparse_linear.h"

#include "block_product_plain.cuh"

namespace fastprune {

extern "C" __global__ void __launch_bounds__(kLinearThreads)
    block_sparse_linear_f32(const BlockProductArgs<float> args) {
  any_block_product(args);
}

extern "C" __global__ void __launch_bounds__(kLinearThreads)
    block_sparse_linear_f16(const BlockProductArgs<__half> args) {
  any_block_product(args);
}

extern "C" __global__ void __launch_bounds__(kLinearThreads)
    block_sparse_linear_bf16(const BlockProductArgs<__nv_bfloat16> args) {
  any_block_product(args);
}

namespace {

template <class T>
cudaError_t launch(const BlockProductArgs<T>& args, int64_t kept, LinearArithmetic arithmetic,
                   bool input_gradient, BlockProductKernel<T> any, cudaStream_t stream,
                   const char** kernel) {
  const auto aligned = [](const T* data, int64_t elements) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(elements) * sizeof(T)) %
               16 ==
           0;
  };
  // A single row has no stride that matters.
  const int64_t row_stride = args.input.rows > 1 ? args.input.row_stride : 0;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  const BlockProductShape shape{args.input.rows,
                                args.input.cols,
                                args.output.cols,
                                args.weight.steps,
                                args.weight.outputs,
                                kept,
                                input_gradient,
                                aligned(args.weight.values, 0),
                                aligned(args.input.data, row_stride | args.input.cols),
                                multiprocessors};
  const auto plan = plan_block_product(shape, arithmetic);
  if (!plan) return cudaErrorInvalidConfiguration;
  const LaunchPlan& launch = plan->launch;
  *kernel = launch.kernel;
  if (launch.grid[0] == 0) return cudaSuccess;
  const auto function =
      plan->tile == LinearTile::kAny ? any : tile_kernel(plan->tile, input_gradient, T{});
  // More than a kernel gets unasked.
  if (launch.shared_bytes > 48 * 1024) {
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(launch.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  function<<<dim3(launch.grid[0], launch.grid[1], launch.grid[2]),
             dim3(launch.block[0], launch.block[1], launch.block[2]), launch.shared_bytes,
             stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_block_product(const BlockProductArgs<float>& args, int64_t kept, bool allow_tf32,
                                 bool input_gradient, cudaStream_t stream, const char** kernel) {
  const auto arithmetic = allow_tf32 ? LinearArithmetic::kTf32 : LinearArithmetic::kF32;
  return launch(args, kept, arithmetic, input_gradient, block_sparse_linear_f32, stream, kernel);
}

cudaError_t launch_block_product(const BlockProductArgs<__half>& args, int64_t kept,
                                 bool input_gradient, cudaStream_t stream, const char** kernel) {
  return launch(args, kept, LinearArithmetic::kF16, input_gradient, block_sparse_linear_f16, stream,
                kernel);
}

cudaError_t launch_block_product(const BlockProductArgs<__nv_bfloat16>& args, int64_t kept,
                                 bool input_gradient, cudaStream_t stream, const char** kernel) {
  return launch(args, kept, LinearArithmetic::kBf16, input_gradient, block_sparse_linear_bf16,
                stream, kernel);
}

}  // namespace fastprune
