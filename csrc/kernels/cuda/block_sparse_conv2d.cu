// The plain kernels of block_sparse_conv2d and its input gradient, for any block, and the launchers
// of all their kernels.
#include "block_sparse_conv2d.h"

#include "block_product_plain.cuh"
#include "block_sparse_conv2d_operands.cuh"

namespace fastprune {

// Thread blocks that fit the registers of a multiprocessor: left alone, the compiler takes so many
// for float32 that five do.
constexpr int kPlainBlocks = 7;

extern "C" __global__ void __launch_bounds__(kLinearThreads, kPlainBlocks)
    block_sparse_conv2d_f32(const ConvolutionProductArgs<float> args) {
  any_block_product(args);
}

extern "C" __global__ void __launch_bounds__(kLinearThreads, kPlainBlocks)
    block_sparse_conv2d_f16(const ConvolutionProductArgs<__half> args) {
  any_block_product(args);
}

extern "C" __global__ void __launch_bounds__(kLinearThreads, kPlainBlocks)
    block_sparse_conv2d_bf16(const ConvolutionProductArgs<__nv_bfloat16> args) {
  any_block_product(args);
}

namespace {

constexpr ConvolutionKernel<float> any_kernel(float) { return block_sparse_conv2d_f32; }
constexpr ConvolutionKernel<__half> any_kernel(__half) { return block_sparse_conv2d_f16; }
constexpr ConvolutionKernel<__nv_bfloat16> any_kernel(__nv_bfloat16) {
  return block_sparse_conv2d_bf16;
}

}  // namespace

template <class T>
cudaError_t launch_convolution(const ConvolutionProductArgs<T>& args, const ConvolutionPlan& plan,
                               bool input_gradient, cudaStream_t stream) {
  const LaunchPlan& launch = plan.launch;
  if (launch.grid[0] == 0) return cudaSuccess;
  const auto kernel = plan.tile == LinearTile::kAny
                          ? any_kernel(T{})
                          : convolution_kernel(plan.tile, input_gradient, T{});
  // More than a kernel gets unasked.
  if (launch.shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<dim3(launch.grid[0], launch.grid[1], launch.grid[2]),
           dim3(launch.block[0], launch.block[1], launch.block[2]), launch.shared_bytes, stream>>>(
      args);
  return cudaGetLastError();
}

template cudaError_t launch_convolution(const ConvolutionProductArgs<float>&,
                                        const ConvolutionPlan&, bool, cudaStream_t);
template cudaError_t launch_convolution(const ConvolutionProductArgs<__half>&,
                                        const ConvolutionPlan&, bool, cudaStream_t);
template cudaError_t launch_convolution(const ConvolutionProductArgs<__nv_bfloat16>&,
                                        const ConvolutionPlan&, bool, cudaStream_t);

}  // namespace fastprune
