// The tensor-core kernels of one type, named as in block_sparse_conv2d_plan.h.
#pragma once

#include "block_product.cuh"
#include "block_sparse_conv2d.h"
#include "block_sparse_conv2d_operands.cuh"

// kBlocks thread blocks fit the registers of a multiprocessor.
#define FASTPRUNE_CONVOLUTION_TILE(kernel, T, Tile, kStepsTogether, kAligned, kBlocks)  \
  extern "C" __global__ void __launch_bounds__(Tile::kThreads, kBlocks)                 \
      kernel(const ConvolutionProductArgs<T> args) {                                    \
    TileProduct<ConvolutionProductArgs, T, Tile, kStepsTogether, kAligned>(args).run(); \
  }

// All kernels of one direction, and name##_kernels, which holds them in the order of LinearTile.
#define FASTPRUNE_CONVOLUTION_KERNELS(name, T, kStepsTogether)                                  \
  FASTPRUNE_CONVOLUTION_TILE(name##_64x64_by_16, T, SmallTile, kStepsTogether, true, 4)         \
  FASTPRUNE_CONVOLUTION_TILE(name##_64x64_by_16_narrow, T, SmallTile, kStepsTogether, false, 4) \
  FASTPRUNE_CONVOLUTION_TILE(name##_256x64_by_16, T, LargeTile<16>, kStepsTogether, true, 2)    \
  FASTPRUNE_CONVOLUTION_TILE(name##_256x64_by_32, T, LargeTile<32>, kStepsTogether, true, 2)    \
  FASTPRUNE_CONVOLUTION_TILE(name##_256x64_by_64, T, LargeTile<64>, kStepsTogether, true, 2)    \
  constexpr void (*name##_kernels[])(ConvolutionProductArgs<T>) = {                             \
      name##_64x64_by_16, name##_64x64_by_16_narrow, name##_256x64_by_16, name##_256x64_by_32,  \
      name##_256x64_by_64};
